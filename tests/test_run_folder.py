"A folder that holds a run, or half of one, or another one: what may happen to it, and what may not."
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from faulty import Interrupt, history, make_sample_run, outcome, small  # noqa: F401
from resnet_cifar.history import Curves, History
from resnet_cifar import preparation, run_folder, trainer
from resnet_cifar.checkpoint import load_checkpoint, save_checkpoint
from resnet_cifar.data import sample_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.run_folder import RUN_FILES, RunFolder, RunResult, find_run
from resnet_cifar.training import Callback
from resnet_cifar.weights import save_pretrained


@pytest.fixture(scope='module', autouse=True)
def same_sources():
    "Whoever edits the package while the tests run does not change what a run notes."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, 'sources_digest', lambda: '0'*64)
        yield


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The folder of a finished run of three epochs in `whole`, and of one in `stopped` whose last.ckpt is of the middle of the second."
    folder, before, save_seconds = tmp_path_factory.mktemp('runs'), preparation.load_cifar10, trainer.Checkpointer.after_step
    preparation.load_cifar10 = lambda root, skip_checksum: sample_cifar10()
    trainer.Checkpointer.after_step = trainer.Checkpointer.save # after each step
    try:
        result = trainer.run(small(folder/'whole', num_epochs=3))
        with pytest.raises(KeyboardInterrupt): trainer.run(small(folder/'stopped', num_epochs=3), callbacks=[Interrupt(6)])
    finally:
        preparation.load_cifar10 = before
        trainer.Checkpointer.after_step = save_seconds
    return SimpleNamespace(folder=folder, result=result, outcome=outcome(folder/'whole'))


@pytest.fixture
def copied(runs, tmp_path):
    "A copy of one of them, to be changed."
    def copy(name):
        shutil.copytree(runs.folder/name, tmp_path/name)
        return tmp_path/name
    return copy


def contents(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- what a run leaves

def test_files_agree_with_each_other(runs):
    whole = runs.folder/'whole'
    assert sorted(path.name for path in whole.iterdir())==sorted(RUN_FILES)
    saved, config = load_checkpoint(whole/'last.ckpt'), json.loads((whole/'config.json').read_text())
    assert [row['valid_loss'] for row in saved['history']]==[float(row['valid_loss']) for row in history(whole)]
    assert json.loads((whole/'result.json').read_text())==dataclasses.asdict(runs.result)
    assert (config['width'], config['processes'], len(config['sources']))==(8, 1, 64) and 'changed' not in config
    recalls = runs.result.per_class_accuracy.values()
    assert sum(recalls)/10==pytest.approx(runs.result.test_accuracy) # 50 images, five of each class
    assert runs.result.seconds > sum(row['seconds'] for row in saved['history'])
    assert find_run(RunFolder(whole), small(whole, num_epochs=3), 'auto', False)==runs.result


@pytest.mark.parametrize('seconds, drawn', [(1.0, [5]), (14.0, [3, 5]), (60.0, [1, 2, 3, 4, 5])])
def test_curves_are_drawn_at_the_end_and_about_twice_a_minute(monkeypatch, tmp_path, seconds, drawn):
    found, state, keepers = [], SimpleNamespace(epoch=0, history=[]), (History(tmp_path, 5), Curves(tmp_path, 5))
    def draw(self, rows, file):
        if rows: Path(file).write_bytes(b'')
        found.append(len(rows))
    monkeypatch.setattr(Curves, '_draw', draw)
    for keeper in keepers: keeper.before_fit(state)
    assert not list(tmp_path.iterdir()) and found==[0] # tried, into nothing
    for state.epoch in range(1, 6):
        state.history.append(dict(epoch=state.epoch - 1, lr=0.1, train_loss=1.0, train_accuracy=0.5, valid_loss=None, valid_accuracy=None, seconds=seconds))
        for keeper in keepers: keeper.after_epoch(state)
    assert found==[0, *drawn] and len(history(tmp_path))==5


# ---------------------------------------------------------------- one run a folder

def test_a_folder_belongs_to_one_run_at_a_time(sample_run, tmp_path):
    inside, proceed, results = threading.Event(), threading.Event(), []

    class Wait(Callback):
        def after_step(self, state):
            inside.set()
            proceed.wait(60)
    thread = threading.Thread(target=lambda: results.append(trainer.run(small(tmp_path/'run', num_epochs=1), callbacks=[Wait()])))
    thread.start()
    assert inside.wait(60)
    try:
        for _ in range(2): # the refused one does not take the lock away
            with pytest.raises(FileExistsError, match='--ckpt_dir .*: another process is training there'): sample_run(tmp_path/'run', num_epochs=1, resume='auto')
    finally: proceed.set()
    thread.join()
    assert results and not (tmp_path/'run'/'.resnet_cifar.lock').exists()


def test_a_killed_process_leaves_no_lock_although_its_children_live(tmp_path):
    "Data workers are forked, and live for some seconds longer."
    (tmp_path/'run').mkdir()
    code = f'''
import os, time
from resnet_cifar.files import locked
with locked({str(tmp_path/"run"/".resnet_cifar.lock")!r}):
    os.write(1, b'child\\n' if os.fork()==0 else b'parent\\n')
    time.sleep(60)
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert {process.stdout.readline() for _ in range(2)}=={'child\n', 'parent\n'}
        with pytest.raises(FileExistsError, match='another process is training there'), RunFolder(tmp_path/'run').held(): pass
        process.kill()
        process.wait()
        with RunFolder(tmp_path/'run').held(): pass
    finally: os.killpg(process.pid, signal.SIGKILL) # the child
    assert not (tmp_path/'run'/'.resnet_cifar.lock').exists()


@pytest.mark.parametrize('settings, resume, error, words', [
    (dict(ckpt_dir='file'), None, NotADirectoryError, '--ckpt_dir file: .* is a file'),
    (dict(ckpt_dir='file/below/run'), None, NotADirectoryError, 'is a file'),
    (dict(ckpt_dir='/proc/run'), None, PermissionError, '--ckpt_dir /proc/run: '),
    (dict(ckpt_dir='a/b/run', valid_size=990), None, ValueError, '--batch_size 50'),
    (dict(ckpt_dir='a/b/run', image_sizes=(8,), model_name='resnet18', shortcut='A', stem='patch', width=16), None, ValueError, 'option A'),
    (dict(ckpt_dir='a/b/run'), 'nowhere', FileNotFoundError, '--resume nowhere: nowhere: no such file'),
    (dict(ckpt_dir='a/b/run'), 'empty', FileNotFoundError, '--resume empty: empty/last.ckpt: no such file'),
])
def test_what_cannot_begin_leaves_no_folder(sample_run, tmp_path, monkeypatch, settings, resume, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').write_text('mine')
    (tmp_path/'empty').mkdir()
    with pytest.raises(error, match=words): sample_run(settings.pop('ckpt_dir'), resume=resume, **settings)
    assert sorted(path.name for path in tmp_path.iterdir())==['empty', 'file'] and (tmp_path/'file').read_text()=='mine'


# ---------------------------------------------------------------- finished runs

def test_a_finished_run_is_not_run_again(runs, sample_run, copied, capsys):
    folder = copied('whole')
    before = contents(folder)
    with pytest.raises(FileExistsError, match='holds a run: --resume auto continues it, --overwrite starts anew'): sample_run(folder, num_epochs=3)
    assert sample_run(folder, num_epochs=3, resume='auto')==runs.result
    assert 'is finished; --overwrite starts it anew' in capsys.readouterr().out
    assert sample_run(folder, num_epochs=2, lr=0.5, tta=True, resume=str(folder))==runs.result # fewer epochs than it has
    printed = capsys.readouterr().out
    for name, now, then in (('num_epochs', 2, 3), ('lr', 0.5, 0.01), ('tta', True, False)):
        assert f'--{name} {now}: without effect, the run is finished and has {then}' in printed
    assert contents(folder)==before


@pytest.mark.parametrize('name, text', [('result.json', ''), ('result.json', '{"test_accuracy": 0.5}'), ('config.json', '{')])
def test_a_damaged_result(sample_run, copied, name, text):
    folder = copied('whole')
    (folder/name).write_text(text)
    with pytest.raises(ValueError, match='the result there cannot be read .*--overwrite starts the run anew'): sample_run(folder, num_epochs=3, resume='auto')


def test_table_and_result_are_made_again(runs, sample_run, copied):
    "As if the run had been killed while it tested, and before it wrote its table."
    folder = copied('whole')
    for name in ('history.csv', 'curves.png', 'result.json'): (folder/name).unlink()
    assert sample_run(folder, num_epochs=3, resume='auto').state_digest==runs.result.state_digest
    assert outcome(folder)==runs.outcome and (folder/'curves.png').exists()


def test_more_epochs_for_a_finished_run(runs, sample_run, tmp_path):
    "As the rate does not depend on their number, it is as if they had been asked for from the start."
    sample_run(tmp_path/'run', num_epochs=2)
    assert sample_run(tmp_path/'run', num_epochs=3, resume='auto').state_digest==runs.result.state_digest
    assert history(tmp_path/'run')==runs.outcome[0]


# ---------------------------------------------------------------- resumed here and elsewhere

def test_resumed_within_an_epoch(runs, sample_run, copied, capsys):
    folder = copied('stopped')
    assert sample_run(folder, num_epochs=3, resume='auto').state_digest==runs.result.state_digest
    assert 'continued after 1 finished epochs and 1 steps' in capsys.readouterr().out and outcome(folder)==runs.outcome
    assert 'changed' not in json.loads((folder/'config.json').read_text())


def test_resumed_in_another_folder(runs, sample_run, tmp_path):
    elsewhere = str(runs.folder/'stopped')
    before = contents(runs.folder/'stopped')
    assert sample_run(tmp_path/'run', num_epochs=3, resume=elsewhere).state_digest==runs.result.state_digest
    assert history(tmp_path/'run')==runs.outcome[0] and contents(runs.folder/'stopped')==before
    assert json.loads((tmp_path/'run'/'config.json').read_text())['changed']==[f'begun elsewhere: {elsewhere}']
    with pytest.raises(FileExistsError, match='holds a run'): sample_run(tmp_path/'run', num_epochs=3, resume=elsewhere)


def test_killed_right_after_it_was_resumed_over_another_run(runs, sample_run, tmp_path):
    "--overwrite gives up the run in the folder: what continues later is the run that was resumed."
    sample_run(tmp_path/'run', num_epochs=1, random_seed=1)
    sample_run(tmp_path/'run', num_epochs=3, resume=str(runs.folder/'stopped'), overwrite=True, after=1)
    assert sample_run(tmp_path/'run', num_epochs=3, resume='auto').state_digest==runs.result.state_digest


@pytest.mark.parametrize('path, words', [('best.ckpt', 'holds no optimizer'), ('facts.ckpt', 'facts.ckpt is not of a run'), ('text.ckpt', 'text.ckpt'),
                                         ('pretrained', 'pretrained/last.ckpt: no such file')])
def test_what_cannot_be_resumed(copied, sample_run, tmp_path, path, words):
    source = copied('stopped')
    save_checkpoint(source/'facts.ckpt', dict(format=load_checkpoint(source/'last.ckpt')['format'], model={}))
    (source/'text.ckpt').write_text('no weights')
    (source/'pretrained').mkdir()
    save_pretrained(create_model('resnet10', width=8), source/'pretrained')
    with pytest.raises((ValueError, FileNotFoundError), match=f'--resume .*{words}'): sample_run(tmp_path/'new', resume=str(source/path))
    assert not (tmp_path/'new').exists()


# ---------------------------------------------------------------- other settings

@pytest.mark.parametrize('settings', [dict(model_name='resnet20', width=16), dict(width=16), dict(shortcut='C'), dict(stem='cifar'), dict(norm_weight_decay=False),
                                      dict(optimizer='Adam'), dict(lr_scheduler='StepLR'), dict(valid_size=0), dict(valid_size=200), dict(whiten=True)])
def test_settings_that_contradict_the_checkpoint(runs, settings):
    folder = runs.folder/'stopped'
    config = preparation.resolve(small(folder, num_epochs=4, **settings))
    with pytest.raises(ValueError, match=f'--{next(iter(settings))} .*: the run in .* has .*; give the same, another --ckpt_dir, or --overwrite'):
        find_run(RunFolder(folder), config, 'auto', False)


@pytest.mark.parametrize('settings', [dict(batch_size=25), dict(random_seed=1), dict(limit_train=100), dict(image_sizes=(16,)), dict(transform=True)])
def test_settings_that_may_change_between_epochs(runs, copied, settings):
    name = next(iter(settings))
    config = preparation.resolve(small(runs.folder/'stopped', num_epochs=3, **settings))
    with pytest.raises(ValueError, match=f'--{name} .* and is within an epoch'): find_run(RunFolder(runs.folder/'stopped'), config, 'auto', False)
    folder = copied('whole')
    (folder/'result.json').unlink()
    config = preparation.resolve(small(folder, num_epochs=4, **settings))
    found = find_run(RunFolder(folder), config, 'auto', False)
    assert any(line.startswith(f'--{name} ') for line in found.changed)


def test_other_settings_hold_from_where_a_run_continues(sample_run, copied, capsys):
    folder = copied('stopped')
    sample_run(folder, num_epochs=4, lr=0.02, tta=True, num_workers=1, resume='auto')
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if 'was' in line]==['--num_epochs 4: was 3 for the first 1 epochs', '--lr 0.02: was 0.01 for the first 1 epochs']
    rows = history(folder)
    assert [row['lr'] for row in rows]==['0.01', '0.01', '0.02', '0.02'] # within the second epoch; it began with the old rate
    assert json.loads((folder/'config.json').read_text())['changed']==[line for line in printed if 'was' in line]


def test_other_threads_and_processors_are_noted(runs, copied, capsys):
    "The bits depend on them."
    folder = copied('stopped')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | dict(threads=99, processor='abacus')))
    resolved = preparation.resolve(small(folder, num_epochs=3))
    RunFolder(folder).open(resolved, find_run(RunFolder(folder), resolved, 'auto', False))
    changed = json.loads((folder/'config.json').read_text())['changed']
    assert [line.split(' before')[0] for line in changed]==['threads: 99', 'processor: abacus']
    assert all(line in capsys.readouterr().out for line in changed[:1])


@pytest.mark.parametrize('num_epochs, words', [(1, 'has 1 finished epochs and is within the next'), (3, None)])
def test_fewer_epochs_than_there_are(runs, num_epochs, words):
    folder = runs.folder/'stopped'
    if words is None: assert find_run(RunFolder(folder), preparation.resolve(small(folder, num_epochs=3)), 'auto', False).saved['epoch']==1
    else:
        with pytest.raises(ValueError, match=f'--num_epochs {num_epochs}: the run in .* {words}'): find_run(RunFolder(folder), preparation.resolve(small(folder, num_epochs=num_epochs)), 'auto', False)


# ---------------------------------------------------------------- the best epoch's file

def test_best_file_ahead_of_its_run(sample_run, tmp_path, runs):
    "Killed between best.ckpt and last.ckpt: the same settings make that epoch again, others are refused before anything is computed."
    best = runs.result.tested_epoch
    assert best > 0 # else this test would test nothing
    sample_run(tmp_path/'run', num_epochs=3, after=4*best + 1)
    shutil.copyfile(runs.folder/'whole'/'best.ckpt', tmp_path/'run'/'best.ckpt')
    with pytest.raises(ValueError, match=f'best.ckpt is of epoch {best}, the best so far is'): sample_run(tmp_path/'run', num_epochs=3, lr=0.5, resume='auto')
    assert sample_run(tmp_path/'run', num_epochs=3, resume='auto').state_digest==runs.result.state_digest


def test_a_lost_best_file_is_noticed_at_once(copied, sample_run):
    folder = copied('stopped')
    (folder/'best.ckpt').unlink()
    with pytest.raises(FileNotFoundError, match='--resume: the best epoch so far is 0, but .*best.ckpt: no such file'): sample_run(folder, num_epochs=3, resume='auto')


# ---------------------------------------------------------------- --overwrite

def test_an_old_run_stays_until_the_new_one_can_begin(copied, sample_run, monkeypatch):
    folder = copied('whole')
    before = contents(folder)
    with pytest.raises(ValueError): sample_run(folder, overwrite=True, valid_size=990)
    with pytest.raises(ValueError, match='--overwrite would remove what it continues'): sample_run(folder, overwrite=True, resume=str(folder))
    def no_memory(*arguments): raise MemoryError
    monkeypatch.setattr(trainer, 'plan', no_memory)
    with pytest.raises(MemoryError, match='out of memory with --batch_size 50: try half of it'): sample_run(folder, overwrite=True)
    assert contents(folder)==before


def test_only_what_this_program_made_is_removed(copied, sample_run, tmp_path):
    folder = copied('whole')
    mine = ['notes.txt', 'tensorboard/events.out.tfevents.1.mine', 'tensorboard/figure.png', '.other.tmp.ckpt', 'model.ckpt']
    (folder/'tensorboard').mkdir()
    for name in [*mine, '.last.resnet_cifar-tmp.ckpt', '.result.resnet_cifar-tmp.json', 'last.ckpt.damaged']: (folder/name).write_text(name)
    sample_run(folder, num_epochs=1, overwrite=True)
    left = [str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()]
    assert sorted(left)==sorted([*mine, *RUN_FILES])


def test_an_old_run_is_whole_or_gone(copied):
    "Killed after any of the files was removed, the folder holds no result that something else has made."
    folder = copied('whole')
    order = [name for name in RUN_FILES if (folder/name).exists()]
    assert order[0]=='result.json' and order[-1]=='config.json' and order.index('previous.ckpt') < order.index('last.ckpt') < order.index('best.ckpt')


def test_relative_folders_have_names(sample_run, tmp_path, monkeypatch):
    "A run in the folder where one is, and in one on another drive as far as paths can tell."
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    result = sample_run('.', num_epochs=1)
    assert isinstance(result, RunResult) and (Path('result.json')).exists()
    def other_drive(*paths): raise ValueError("path is on mount 'D:', start on mount 'C:'")
    monkeypatch.setattr(os.path, 'relpath', other_drive)
    assert trainer.result_lines(small('.'), result)[1]=='run folder    . (curves.png shows the history)'
