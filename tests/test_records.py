"Recorded runs: their settings are settings still, their commands give them back, their numbers fit together, and the shortest one gives the same bits again."
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import resnet_cifar
from faulty import make_sample_run  # noqa: F401
from resnet_cifar.checkpoint import load_checkpoint
from resnet_cifar.cli import main
from resnet_cifar.config import command_of, parse_args
from resnet_cifar.records import read_record, record_paths, run_lines, write_record
from resnet_cifar.run_folder import sources_digest
from resnet_cifar.speed import processor_kind

NBS = Path(__file__).parent.parent/'nbs'
RECORDS = record_paths(NBS/'runs')
FIGURES = { # (page, cell) -> the records that its figure is made of, and how many there are of each setting
    ('index', 'depth-figure'): ('depth-*', 1), ('build/18_trainer', 'run-figure'): ('resnet20-t_max-20', 1), ('learn/10_your_images', 'card-figure'): ('resnet20', 1),
    ('learn/07_results', 'depth-figure'): ('depth-*', 1), ('learn/07_results', 'climb-figure'): ('resnet*-t_max-*', 1), ('learn/07_results', 'parts-figure'): ('part-*', 5),
    ('learn/07_results', 'precision-figure'): ('precision-*', 3), ('learn/07_results', 'ranks-figure'): ('ranks-*', 3),
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
        assert len(records) >= n and re.search('n = 1|one run' if n==1 else f'n = {n}', captions[place]), place
        for record in records:
            versions = record['result']['versions']
            for text in (record['config'].precision, f"Python {versions['python']}", f"torch {versions['torch']}"): assert text in captions[place], place
            assert record['processes'] > 1 or record['result']['machine'] in captions[place], place


def test_the_front_page_says_what_its_figure_shows():
    "The figure's description, which the README has too, by the records."
    alt = re.search(r'!\[(.*?)\]\(nbs/index_files/depth-figure', (NBS.parent/'README.md').read_text(encoding='utf-8'))[1]
    for name in ('plain56', 'plain20', 'resnet20', 'resnet56'):
        error = 1 - read_record(NBS/'runs'/f'depth-{name}.json')['history'][-1]['train_accuracy']
        assert re.search(rf'{name}[^,.]* (to )?{error:.2f}', alt), name


def test_a_record_whose_settings_no_longer_parse(tmp_path, capsys):
    "Is an error for the function that reads records; the command lists the others all the same."
    whole = json.loads(RECORDS[0].read_text())
    for name, change in dict(renamed={'learning_rate': 0.1}, gone={'optimizer': 'Lion'}, typed={'num_epochs': '3'}, ranged={'lr': -1.0}).items():
        path = tmp_path/f'{name}.json'
        path.write_text(json.dumps(whole | dict(config=whole['config'] | change)))
        with pytest.raises(ValueError, match=rf'{name}\.json: .*{next(iter(change))}'): read_record(path)
    (tmp_path/'whole.json').write_text(json.dumps(whole))
    lines, errors = run_lines(tmp_path)
    assert len(errors)==4 and lines[0].startswith('whole: test accuracy ') and lines[1].startswith('  OMP_NUM_THREADS=')
    assert settings_of(lines[1])==dataclasses.asdict(read_record(RECORDS[0])['config']) | dict(ckpt_dir='checkpoints/whole')
    assert main(['info', '--runs', str(tmp_path)])==1
    printed = capsys.readouterr()
    assert printed.out.splitlines()==lines and printed.err.count('error: ')==printed.err.count('\n')==4


def test_what_is_no_record(tmp_path):
    whole = json.loads(RECORDS[0].read_text())
    for name, change in dict(commit=dict(commit=None), versions=dict(result=whole['result'] | dict(versions={})), seconds=dict(result=whole['result'] | dict(seconds='9'))).items():
        (tmp_path/f'{name}.json').write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=f'{name}.json: is no record of a run'): read_record(tmp_path/f'{name}.json')
    (tmp_path/'cut.json').write_text(json.dumps({name: value for name, value in whole.items() if name!='history'}))
    (tmp_path/'bench.json').write_text('{"model_name": "resnet18"}')
    assert [path.name for path in record_paths(tmp_path)]==['commit.json', 'cut.json', 'seconds.json', 'versions.json'] # damaged ones too, other measurements not
    (tmp_path/'empty').mkdir()
    for folder in ('empty', 'nowhere'):
        with pytest.raises(FileNotFoundError, match='holds no record of a run'): run_lines(tmp_path/folder)


# ---------------------------------------------------------------- writing one

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout of our own, behind a symbolic link, whose package is the one that runs."
    folder = tmp_path/'checkout'
    shutil.copytree(NBS.parent/'resnet_cifar', folder/'resnet_cifar', ignore=shutil.ignore_patterns('__pycache__', 'weights', 'sample'))
    (tmp_path/'link').symlink_to(folder)
    monkeypatch.setattr(resnet_cifar, '__file__', str(tmp_path/'link'/'resnet_cifar'/'__init__.py'))
    git(folder, 'init', '-q')
    commit(folder)
    return folder


def git(folder, *words):
    return subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x', *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder):
    git(folder, 'add', '-A')
    git(folder, 'commit', '-qm', 'all')


def finished_run(folder, **changes):
    "What a finished run leaves, as far as a record needs it; `changes` in its config.json."
    folder.mkdir()
    record = json.loads((NBS/'runs'/'ranks-1-seed-0.json').read_text())
    noted = dict(threads=2, processes=1, processor='abacus', sources=sources_digest(), root='/somewhere', ckpt_dir=str(folder))
    (folder/'config.json').write_text(json.dumps(record['config'] | noted | changes))
    (folder/'result.json').write_text(json.dumps(record['result']))
    from resnet_cifar.checkpoint import FORMAT, save_checkpoint
    save_checkpoint(folder/'last.ckpt', dict(format=FORMAT, history=record['history']))
    return record


def test_a_record_of_a_run(checkout, sample_run, tmp_path):
    "A whole run, and its record: what is in it is what the run left, without its paths."
    result = sample_run(tmp_path/'tiny', num_epochs=1)
    path = write_record(tmp_path/'tiny')
    assert path==checkout/'nbs'/'runs'/'tiny.json' and str(tmp_path) not in path.read_text()
    record = read_record(path)
    assert record['result']==dataclasses.asdict(result) and record['history']==load_checkpoint(tmp_path/'tiny'/'last.ckpt')['history']
    assert (record['commit'], record['sources'], record['processor'], record['processes'])==(git(checkout, 'rev-parse', 'HEAD'), sources_digest(), processor_kind(), 1)
    assert settings_of(record['command'])==dataclasses.asdict(record['config']) and record['config'].num_epochs==1


def test_a_record_replaces_none(checkout, tmp_path):
    whole = finished_run(tmp_path/'run')
    path = write_record(tmp_path/'run')
    record = read_record(path)
    assert (record['history'], record['result'], record['threads'])==(whole['history'], whole['result'], 2)
    path.write_text('somebody else')
    with pytest.raises(FileExistsError, match='--overwrite replaces it, --name gives another name'): write_record(tmp_path/'run')
    assert path.read_text()=='somebody else'
    assert write_record(tmp_path/'run', name='other').name=='other.json' and write_record(tmp_path/'run', overwrite=True)==path and read_record(path)==record
    for name in ('', '../other', '.hidden', 'a/b'):
        with pytest.raises(ValueError, match='--name'): write_record(tmp_path/'run', name=name)


def test_a_record_is_named_after_its_folder(checkout, tmp_path, monkeypatch):
    "Whatever the folder is called on the command line."
    finished_run(tmp_path/'run')
    monkeypatch.chdir(tmp_path/'run')
    assert write_record('.').name=='run.json'


def test_what_cannot_be_recorded(checkout, tmp_path):
    "A run that no command makes again, or one whose code no commit holds."
    finished_run(tmp_path/'changed', changed=['--lr 0.5: was 0.1 for the first 2 epochs'])
    with pytest.raises(ValueError, match='no command makes this run again.*--lr 0.5: was 0.1'): write_record(tmp_path/'changed')
    finished_run(tmp_path/'run')
    (checkout/'notes.txt').write_text('')
    with pytest.raises(ValueError, match=r'the checkout is not clean \(\?\? notes.txt\): commit first'): write_record(tmp_path/'run')
    (checkout/'notes.txt').unlink()
    with open(checkout/'resnet_cifar'/'blocks.py', 'a') as file: file.write('# changed\n')
    with pytest.raises(ValueError, match='made by other code'): write_record(tmp_path/'run')
    commit(checkout)
    with pytest.raises(ValueError, match='made by other code'): write_record(tmp_path/'run')
    (tmp_path/'run'/'result.json').unlink()
    with pytest.raises(FileNotFoundError, match='holds no finished run'): write_record(tmp_path/'run')


def test_a_package_outside_a_checkout(checkout, tmp_path, monkeypatch):
    finished_run(tmp_path/'run')
    shutil.copytree(checkout/'resnet_cifar', tmp_path/'elsewhere'/'resnet_cifar')
    monkeypatch.setattr(resnet_cifar, '__file__', str(tmp_path/'elsewhere'/'resnet_cifar'/'__init__.py'))
    with pytest.raises(ValueError, match='in no git checkout'): write_record(tmp_path/'run')
    shutil.copytree(checkout/'resnet_cifar', checkout/'vendor'/'resnet_cifar')
    monkeypatch.setattr(resnet_cifar, '__file__', str(checkout/'vendor'/'resnet_cifar'/'__init__.py'))
    with pytest.raises(ValueError, match='is not that of the checkout'): write_record(tmp_path/'run')


@pytest.mark.long
def test_the_shortest_run_gives_the_same_bits_again(command, cifar10_root, tmp_path):
    "As recorded, on the same kind of machine with the same versions. Elsewhere bits differ and the accuracy hardly does: there it is run twice."
    record = min((r for r in map(read_record, RECORDS) if (r['config'].device, r['processes'])==('cpu', 1)), key=lambda r: r['result']['seconds'])

    def again(name):
        words = shlex.split(command_of(record['config']))[1:]
        command('resnet_cifar', *words, '--root', cifar10_root, '--ckpt_dir', tmp_path/name, OMP_NUM_THREADS=str(record['threads']))
        return dict(result=json.loads((tmp_path/name/'result.json').read_text()), history=load_checkpoint(tmp_path/name/'last.ckpt')['history'], processor=processor_kind())

    def kind(run): return run['result']['machine'], run['result']['versions'], run.get('processor')
    def bits(run): return run['result']['state_digest'], run['result']['test_accuracy'], [{k: v for k, v in row.items() if k!='seconds'} for row in run['history']]
    first = again('first')
    if kind(first)==kind(record): assert bits(first)==bits(record)
    else: assert bits(first)==bits(again('second')) and abs(first['result']['test_accuracy'] - record['result']['test_accuracy']) < 0.05
