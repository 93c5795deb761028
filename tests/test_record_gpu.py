"The recording of all sizes, in small: real runs on the processor, in pieces, planned by speeds that are made up."
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from record_gpu import NETWORKS, RUNS, choose_epochs, pixels_share
from resnet_cifar.config import read_record


def test_choose_epochs():
    "At 50,000 images a second an epoch of all six runs takes 6 s. The recipe has 5 epochs at 16 pixels and 8 at 24: 5/4 + 8*9/16 = 5.75; four more make 9.75 of the 10 that fit into a minute."
    assert pixels_share(13, (16,)*5 + (24,)*8 + (32,))==5.75
    assert choose_epochs(dict.fromkeys(NETWORKS, 50_000), 1)==17
    with pytest.raises(SystemExit, match='allow'): choose_epochs(dict.fromkeys(NETWORKS, 50_000), 0.01)


def test_in_pieces(cifar10_root, tmp_path):
    checkout = tmp_path/'checkout'
    for name in ('resnet_cifar', 'tests'): shutil.copytree(ROOT/name, checkout/name, ignore=shutil.ignore_patterns('__pycache__'))
    (checkout/'.gitignore').write_text('__pycache__\n/checkpoints/\n')
    runs = checkout/'nbs'/'runs'
    runs.mkdir(parents=True)
    for name in NETWORKS: (runs/f'gpu-bench-{name}.json').write_text(json.dumps(dict(images_per_second=50_000)))
    for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all']): subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x', *words], cwd=checkout, check=True)

    def piece(minutes):
        words = ['--root', cifar10_root, '--minutes', '0.04', '--piece', minutes, '--width', '4', '--limit_train', '500', '--limit_test', '100', '--device', 'cpu', '--precision', 'fp32']
        return subprocess.run([sys.executable, checkout/'tests'/'record_gpu.py', *map(str, words)], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(checkout)))
    first = piece(0)
    assert (first.returncode, first.stderr.splitlines()[-1])==(1, 'stopped within gpu-resnet18-0; the same command goes on')
    assert first.stdout.splitlines()[0]=='1 epochs'
    last = piece(1000)
    assert (last.returncode, last.stderr, last.stdout.splitlines()[-1])==(0, '', 'all runs are recorded in nbs/runs')
    records = {(name, seed): read_record(runs/f'gpu-{name}-{seed}.json') for name, seed in RUNS}
    assert {key: (r['config'].model_name, r['config'].random_seed, r['config'].num_epochs, r['result']['tested']) for key, r in records.items()}=={(name, seed): (name, seed, 1, 'last') for name, seed in RUNS}
    assert piece(1000).stdout.splitlines()[-1]=='all runs are recorded in nbs/runs' # nothing is left to do

    def table(folder):
        "The lines of the front page's table, made beside the records of this folder."
        cell = next(cell for cell in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'] if cell['id']=='results-table')
        done = subprocess.run([sys.executable, '-c', ''.join(cell['source']).replace('Markdown(', 'print(')], cwd=folder, capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        return [[word.strip() for word in line.split('|')[2:4]] for line in done.stdout.splitlines() if line.startswith(('| `resnet-cifar', '| `--recipe'))]
    accuracy = [records['resnet18', seed]['result']['test_accuracy'] for seed in (0, 1)]
    lines = table(runs.parent)
    assert lines[0]==['network, epochs', 'test accuracy'] and [line[0] for line in lines[1:]]==[f'{name}, 1' for name in NETWORKS]
    assert lines[1][1]==f'{sum(accuracy)/2:.4f} ± {abs(accuracy[0] - accuracy[1])/2**0.5:.4f} (n = 2)' and all(line[1].endswith(' (n = 1)') for line in lines[2:])
    assert table(tmp_path)==[] # no record at all
