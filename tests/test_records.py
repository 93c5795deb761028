"Recorded runs: their settings are settings still, their commands give them back, their numbers fit together, and the shortest one gives the same bits again."
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from resnet_cifar.checkpoint import load_checkpoint
from resnet_cifar.config import TrainConfig, command_of, parse_args, read_record, record_paths
from resnet_cifar.trainer import _kind_of_processor, write_record

NBS = Path(__file__).parent.parent/'nbs'
RECORDS = record_paths(NBS/'runs')
FIGURES = { # (notebook, cell) -> the records that its figure is made of, and how many there are of each setting
    ('index', 'depth-figure'): ('depth-*', 1),
    ('07_trainer', 'run-figure'): ('quick', 1), ('09_speed', 'ranks-figure'): ('ranks-*', 3), ('tutorials/speedrun', 'figure'): ('speedrun', 1),
    ('tutorials/results', 'climb-figure'): ('resnet*-t_max-*', 1), ('tutorials/results', 'depth-figure'): ('depth-*', 1), ('tutorials/results', 'parts-figure'): ('part-*', 5),
    ('tutorials/weights', 'card-figure'): ('resnet20', 1),
}


def settings_of(command):
    "What a command sets, by the words behind `train` or `-m resnet_cifar.trainer`."
    words = shlex.split(command)
    return dataclasses.asdict(parse_args(words[words.index('train') + 1 if 'train' in words else words.index('-m') + 2:])[0])


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.stem)
def test_record(path):
    record = read_record(path)
    config, history, result = record['config'], record['history'], record['result']
    settings = dataclasses.asdict(config)
    assert settings_of(command_of(config, record['processes']))==settings # what `info --runs` prints
    for name, value in settings_of(record['command']).items(): assert settings[name]==value or name in ('device', 'precision', 'width') and value in ('auto', None), name # these the run settles
    assert [row['epoch'] for row in history]==list(range(config.num_epochs))
    scores = [row['valid_accuracy'] for row in history]
    best = scores.index(max(scores)) if config.valid_size else config.num_epochs - 1
    assert (result['tested'], result['tested_epoch'])==('best' if config.valid_size else 'last', best)
    if config.limit_test is None: assert abs(sum(result['per_class_accuracy'].values())/10 - result['test_accuracy']) < 1e-6 # a thousand test images of each class


def test_captions_name_n_machine_and_versions():
    "Of figures that are made of records, as the records say it."
    captions = {(str(path.relative_to(NBS).with_suffix('')), cell['id']): found[1] for path in NBS.glob('**/*.ipynb') if '.ipynb_checkpoints' not in path.parts
                for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if (found := re.search(r'^#\| fig-cap: (.*)', ''.join(cell['source']), re.M))}
    for place, (names, n) in FIGURES.items():
        records = [read_record(path) for path in (NBS/'runs').glob(f'{names}.json')]
        assert len(records) >= n and f'n = {n}' in captions[place], place
        for record in records:
            versions = record['result']['versions']
            for said in (record['config'].precision, f"Python {versions['python']}", f"torch {versions['torch']}"): assert said in captions[place], place
            assert record['processes'] > 1 or record['result']['machine'] in captions[place], place
    assert {place for place in captions if place[0] in ('index', 'tutorials/results', 'tutorials/speedrun', 'tutorials/weights')} <= set(FIGURES)


def test_the_front_page_says_what_its_figure_shows():
    "The figure's description, which the README has too, by the records."
    alt = re.search(r'!\[(.*?)\]\(nbs/index_files/depth-figure', (NBS.parent/'README.md').read_text(encoding='utf-8'))[1]
    for name in ('plain56', 'plain20', 'resnet20', 'resnet56'):
        error = 1 - read_record(NBS/'runs'/f'depth-{name}.json')['history'][-1]['train_accuracy']
        assert re.search(rf'{name}[^,.]* (to )?{error:.2f}', alt), name


def test_a_record_whose_settings_no_longer_parse_is_refused(command, tmp_path):
    "By the function that reads records, and by the command, which lists the others all the same."
    whole = json.loads(RECORDS[0].read_text())
    for name, change in dict(renamed={'learning_rate': 0.1}, gone={'optimizer': 'Lion'}, typed={'num_epochs': '3'}, ranged={'lr': -1.0}).items():
        path = tmp_path/f'{name}.json'
        path.write_text(json.dumps(whole | dict(config=whole['config'] | change)))
        with pytest.raises(ValueError, match=rf'{name}\.json: .*{next(iter(change))}'): read_record(path)
    (tmp_path/'whole.json').write_text(json.dumps(whole))
    done = command('resnet_cifar', 'info', '--runs', '.', code=1)
    assert done.stderr.count('error: ')==done.stderr.count('\n')==4
    said, words = done.stdout.splitlines()
    assert said.startswith('whole: test accuracy ') and words.startswith('  OMP_NUM_THREADS=')
    assert settings_of(words)==dataclasses.asdict(read_record(RECORDS[0])['config']) | dict(ckpt_dir='checkpoints/whole')


def test_what_is_no_record(tmp_path):
    whole = json.loads(RECORDS[0].read_text())
    for name, change in dict(commit=dict(commit=None), versions=dict(result=whole['result'] | dict(versions={})), seconds=dict(result=whole['result'] | dict(seconds='9'))).items():
        (tmp_path/f'{name}.json').write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=f'{name}.json: is no record of a run'): read_record(tmp_path/f'{name}.json')
    (tmp_path/'cut.json').write_text(json.dumps({name: value for name, value in whole.items() if name!='history'}))
    (tmp_path/'bench.json').write_text('{"model_name": "resnet18"}')
    assert [path.name for path in record_paths(tmp_path)]==['commit.json', 'cut.json', 'seconds.json', 'versions.json'] # damaged ones are told of, other measurements are not


def test_a_run_whose_precision_changed_on_the_way_is_not_recorded(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(changed=['precision: was bf16, is fp32'])))
    with pytest.raises(ValueError, match='not recorded.*precision: was bf16'): write_record(TrainConfig(ckpt_dir=str(tmp_path)), None, {})


def test_recording(command, cifar10_root, tmp_path):
    "In a checkout of its own: one record after the other; no record of code that no commit holds, nor of a run that other code began."
    checkout = tmp_path/'checkout'
    shutil.copytree(NBS.parent/'resnet_cifar', checkout/'resnet_cifar', ignore=shutil.ignore_patterns('__pycache__'))
    (checkout/'nbs').mkdir()
    (checkout/'.gitignore').write_text('__pycache__\n')

    def git(*words): return subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x', *words], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()

    def train(name, *more, code=0):
        thin = '--model_name resnet20 --width 4 --num_epochs 1 --limit_train 500 --limit_test 100 --num_workers 0 --resume auto --record'.split()
        return command('resnet_cifar', 'train', *thin, '--root', cifar10_root, '--ckpt_dir', tmp_path/name, *more, code=code, PYTHONPATH=str(checkout))

    git('init', '-q')
    git('add', '-A')
    git('commit', '-qm', 'all')
    for name in ('one', 'two'):
        assert train(name).stdout.splitlines()[-1]==f'record        {name}.json'
        record = read_record(checkout/'nbs'/'runs'/f'{name}.json')
        assert (record['commit'], record['config'].limit_train, len(record['history'])) == (git('rev-parse', 'HEAD'), 500, 1)
        assert str(tmp_path) not in (checkout/'nbs'/'runs'/f'{name}.json').read_text()
    with open(checkout/'resnet_cifar'/'blocks.py', 'a') as file: file.write('# changed\n')
    assert train('three', code=2).stderr=='error: --record: the tree is not clean (M resnet_cifar/blocks.py): commit first\n'
    git('commit', '-qam', 'changed')
    (tmp_path/'one'/'result.json').unlink() # as if it had not come to its end
    assert 'was begun by other code: give --overwrite' in train('one', code=2).stderr


def test_the_shortest_run_gives_the_same_bits_again(command, cifar10_root, tmp_path):
    "As recorded, on the same kind of machine with the same versions. Elsewhere bits differ and the accuracy hardly does: there it is run twice."
    record = min((r for r in map(read_record, RECORDS) if (r['config'].device, r['processes'])==('cpu', 1)), key=lambda r: r['result']['seconds'])

    def again(name):
        words = shlex.split(command_of(record['config']))[1:]
        command('resnet_cifar', *words, '--root', cifar10_root, '--ckpt_dir', tmp_path/name, OMP_NUM_THREADS=str(record['threads']))
        return dict(result=json.loads((tmp_path/name/'result.json').read_text()), history=load_checkpoint(tmp_path/name/'last.ckpt')['history'], processor=_kind_of_processor())

    def kind(run): return run['result']['machine'], run['result']['versions'], run.get('processor')
    def bits(run): return run['result']['state_digest'], run['result']['test_accuracy'], [{k: v for k, v in row.items() if k!='seconds'} for row in run['history']]
    first = again('first')
    if kind(first)==kind(record): assert bits(first)==bits(record)
    else: assert bits(first)==bits(again('second')) and abs(first['result']['test_accuracy'] - record['result']['test_accuracy']) < 0.05
