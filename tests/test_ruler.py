"""The numbers of tests/ruler.json are measured again; and the ruler notices what it is for."""
import json
import subprocess
import sys

from ruler import FILE, differences, machine


def test_the_numbers_are_those_that_are_stored():
    """A minute or two: runs of every kind, all networks, the weights in the package."""
    words = [sys.executable, FILE.with_suffix('.py')]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def changed(path, text):
    """The stored numbers of one machine, with one of them changed, or without it."""
    numbers = next(iter(json.loads(FILE.read_text()).values())) | {path: text}
    return {name: value for name, value in numbers.items() if value is not None}


def test_a_change_is_told_as_far_as_the_machine_allows():
    """Any digit where the processor is known; elsewhere only what no processor changes."""
    stored = json.loads(FILE.read_text())
    here, score = min(stored), 'runs/sgd/test_accuracy'
    old = float(stored[here][score])
    for path, text, told_here, told_elsewhere in (
            ('runs/sgd/train_loss', '1 1 1', True, False),
            ('runs/sgd/lr', '1 1 1', True, True),
            (score, str(old + 0.04), True, False),
            (score, str(old + 0.06), True, True),
            ('runs/sgd/valid_accuracy', '0 1 0', True, True),
            ('networks/resnet18/weights', None, True, True),
            ('networks/resnet19/weights', 'new', True, True)):
        for kind, told in ((here, told_here), ('another machine', told_elsewhere)):
            lines = differences(stored, kind, changed(path, text))
            assert [line.splitlines()[0] for line in lines] == [path] * told, (path, kind)
    assert differences(stored, here, stored[here]) == []
    assert machine().startswith('torch=')
