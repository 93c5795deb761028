"Whole runs of `trainer.run` at their edges: unusual settings, folders that hold another run, files that are missing or damaged, runs that go on elsewhere or otherwise."
import csv
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resnet_cifar.checkpoint import load_checkpoint, load_model
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import sample_cifar10
from resnet_cifar.trainer import lr_plan, run
from resnet_cifar.training import Callback


class StopInSecondEpoch(Callback):
    def after_step(self, state):
        if state.epoch==1: raise KeyboardInterrupt


def history(folder): return [{k: v for k, v in row.items() if k!='seconds'} for row in csv.DictReader(open(folder/'history.csv'))]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with data, the settings of a tiny run, that run finished in `run`, and the same run stopped in its second epoch in `stopped`."
    folder, sample = tmp_path_factory.mktemp('trainer'), sample_cifar10()
    (folder/'data').mkdir()
    np.savez(folder/'data'/'cifar10.npz', **{f'{part}_{kind}': np.resize(array, (count, *array.shape[1:])) for part, count in (('train', 50_000), ('test', 10_000))
        for kind, array in (('images', getattr(sample, f'{part}_images').permute(0, 2, 3, 1).numpy()), ('labels', getattr(sample, f'{part}_labels').numpy().astype(np.uint8)))})
    tiny = TrainConfig(width=4, batch_size=50, num_epochs=2, valid_size=500, limit_train=200, limit_test=150, num_workers=0, device='cpu', precision='fp32', transform=True,
                       root=str(folder/'data'), skip_checksum=True, ckpt_dir=str(folder/'run'))
    result = run(tiny)
    with pytest.raises(KeyboardInterrupt): run(dataclasses.replace(tiny, ckpt_dir=str(folder/'stopped')), callbacks=[StopInSecondEpoch()])
    (folder/'file').write_text('')
    return SimpleNamespace(folder=folder, tiny=tiny, result=result, history=history(folder/'run'))


@pytest.fixture
def tiny(finished, tmp_path): return dataclasses.replace(finished.tiny, ckpt_dir=str(tmp_path/'run'))


def copied(finished, name, tmp_path):
    "A run folder of our own, and the settings for it."
    shutil.copytree(finished.folder/name, tmp_path/'copy')
    return tmp_path/'copy', dataclasses.replace(finished.tiny, ckpt_dir=str(tmp_path/'copy'))


def test_without_validation_and_with_averages(tiny, tmp_path, capsys):
    result = run(dataclasses.replace(tiny, ema_decay=0.9, valid_size=0, tta=True, pin_memory=True, deterministic=True, image_sizes=(16, 32), channels_last=False))
    assert (result.tested, result.tested_epoch, (tmp_path/'run'/'best.ckpt').exists()) == ('last', 1, False) and result.test_accuracy_tta is not None
    assert [row['valid_loss'] for row in history(tmp_path/'run')]==['', '']
    assert capsys.readouterr().out.count('--pin_memory')==1 and not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_is_of_one_network_and_one_optimizer(tiny, tmp_path, capsys):
    other = dataclasses.replace(tiny, shortcut='C', stem='imagenet', norm_weight_decay=False)
    run(other)
    assert ', shortcut C, stem imagenet: ' in capsys.readouterr().out
    assert [load_model(tmp_path/'run').architecture[name] for name in ('shortcut', 'stem')]==['C', 'imagenet']
    assert len(load_checkpoint(tmp_path/'run'/'last.ckpt')['optimizer']['param_groups'])==2
    for changed in (dict(shortcut='B'), dict(stem='cifar'), dict(norm_weight_decay=True)):
        with pytest.raises(ValueError, match=f'--{next(iter(changed))}'): run(dataclasses.replace(other, num_epochs=3, **changed), resume='auto')


def test_a_run_goes_on_in_another_folder(finished, tiny, tmp_path, capsys):
    moved = run(tiny, resume=str(finished.folder/'stopped'))
    assert (moved.state_digest, history(tmp_path/'run'))==(finished.result.state_digest, finished.history)
    with pytest.raises(FileExistsError, match='holds a run'): run(tiny, resume=str(finished.folder/'stopped'))
    capsys.readouterr()
    assert run(dataclasses.replace(tiny, ckpt_dir=str(tmp_path/'more'), num_epochs=1), resume=str(tmp_path/'run')) is None
    assert 'has 2 finished epochs, --num_epochs 1 asks for no more' in capsys.readouterr().out


def test_other_settings_hold_from_where_a_run_goes_on(finished, tmp_path, capsys):
    folder, config = copied(finished, 'stopped', tmp_path)
    config = dataclasses.replace(config, num_epochs=3, lr=0.02)
    capsys.readouterr()
    longer = run(config, resume='auto')
    assert [line.split(':')[0] for line in capsys.readouterr().out.splitlines() if 'was' in line]==['--num_epochs 3', '--lr 0.02']
    rows = history(folder)
    assert (len(rows), rows[0]['lr'], rows[1]['lr'])==(3, str(finished.tiny.lr), str(lr_plan(config, 4)[1]))
    assert len(json.loads((folder/'config.json').read_text())['changed'])==2
    (folder/'result.json').unlink() # as if it had been killed while testing
    assert run(config, resume='auto').state_digest==longer.state_digest


def test_what_cannot_begin_leaves_no_folder(finished, tiny, tmp_path):
    for bad, resume, error, said in ((dict(ckpt_dir=str(finished.folder/'file')), None, NotADirectoryError, '--ckpt_dir'), (dict(batch_size=300), None, ValueError, '--batch_size 300'),
                                     (dict(), 'nowhere', FileNotFoundError, '--resume nowhere: nowhere: no such file')):
        with pytest.raises(error, match=said): run(dataclasses.replace(tiny, **bad), resume=resume)
    assert not (tmp_path/'run').exists() and (finished.folder/'file').read_text()==''


def test_what_cannot_begin_overwrites_nothing(finished, tmp_path):
    folder, config = copied(finished, 'run', tmp_path)
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    for bad, error in ((dict(root=str(finished.folder/'file')), NotADirectoryError), (dict(batch_size=300), ValueError)):
        with pytest.raises(error): run(dataclasses.replace(config, **bad), overwrite=True)
        assert {p.name: p.read_bytes() for p in folder.iterdir()}==kept


def test_table_and_result_are_made_again(finished, tmp_path):
    folder, config = copied(finished, 'run', tmp_path)
    (folder/'history.csv').unlink() # as if it had been stopped between checkpoint and table
    (folder/'result.json').unlink()
    assert run(config, resume='auto').state_digest==finished.result.state_digest
    assert history(folder)==finished.history
    (folder/'result.json').write_text('')
    with pytest.raises(ValueError, match='damaged'): run(config, resume='auto')


def test_resume_auto_begins_where_there_is_no_run(finished, tiny, capsys):
    assert run(tiny, resume='auto').state_digest==finished.result.state_digest
    assert 'there is no run in' in capsys.readouterr().out
    one_class = run(dataclasses.replace(tiny, limit_test=1), overwrite=True)
    assert list(one_class.per_class_accuracy.values())[1:]==[None]*9
