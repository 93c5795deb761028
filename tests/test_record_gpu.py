"The recording of all sizes, in small: real runs on the processor, in pieces, planned by speeds that are made up."
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import record_gpu
from record_gpu import NETWORKS, RUNS, choose_epochs, relative_pixels
from resnet_cifar.records import read_record


def test_choose_epochs():
    "At 50,000 images a second an epoch of all six runs takes 6 s: ten fit into a minute."
    # the recipe has 4 epochs at 24 pixels and 2 at 28: 4*9/16 + 2*49/64 = 3.78; six more make 9.78
    assert relative_pixels(13, (16,)*5 + (24,)*8 + (32,))==5.75 and relative_pixels(3, ())==3
    assert choose_epochs(dict.fromkeys(NETWORKS, 50_000), 1)==12
    with pytest.raises(SystemExit, match='allow'): choose_epochs(dict.fromkeys(NETWORKS, 50_000), 0.01)


def test_a_piece_that_ends(tmp_path, monkeypatch):
    "Stopped in time, ended by itself, ended with an error."
    program = tmp_path/'resnet_cifar.py'
    monkeypatch.setattr(record_gpu, 'ROOT', tmp_path)
    program.write_text('import time\ntime.sleep(60)\n')
    assert record_gpu.stopped_after(['train'], 0.5)
    program.write_text('')
    assert not record_gpu.stopped_after(['train'], 60)
    program.write_text('raise SystemExit(2)\n')
    with pytest.raises(SystemExit, match='error: ended with 2: train --num_epochs 3'): record_gpu.stopped_after(['train', '--num_epochs', 3], 60)


@pytest.mark.long
def test_in_pieces(cifar10_root, tmp_path):
    checkout = tmp_path/'checkout'
    for name in ('resnet_cifar', 'tests'): shutil.copytree(ROOT/name, checkout/name, ignore=shutil.ignore_patterns('__pycache__', '.ruff_cache'))
    (checkout/'.gitignore').write_text('__pycache__\n/checkpoints/\n')
    runs = checkout/'nbs'/'runs'
    runs.mkdir(parents=True)
    for name in NETWORKS: (runs/f'gpu-bench-{name}.json').write_text(json.dumps(dict(images_per_second=50_000)))
    git = ['git', '-c', 'user.name=x', '-c', 'user.email=x']
    for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all']): subprocess.run([*git, *words], cwd=checkout, check=True)

    def piece(minutes):
        words = ['--root', cifar10_root, '--minutes', '0.08', '--piece', minutes]
        words += '--width 8 --limit_train 500 --limit_test 100 --device cpu --precision fp32'.split()
        program = [sys.executable, checkout/'tests'/'record_gpu.py', *map(str, words)]
        return subprocess.run(program, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(checkout)))
    first = piece(0)
    assert (first.returncode, first.stderr.splitlines()[-1])==(1, 'stopped within gpu-resnet18-0; the same command resumes')
    assert first.stdout.splitlines()[0]=='1 epochs'
    last = piece(1000)
    assert (last.returncode, last.stderr, last.stdout.splitlines()[-1])==(0, '', 'all runs are recorded in nbs/runs')
    records = {(name, seed): read_record(runs/f'gpu-{name}-{seed}.json') for name, seed in RUNS}
    found = {key: (r['config'].model_name, r['config'].random_seed, r['config'].num_epochs, r['result']['tested']) for key, r in records.items()}
    assert found=={(name, seed): (name, seed, 1, 'last') for name, seed in RUNS}
    assert piece(1000).stdout.splitlines()[-1]=='all runs are recorded in nbs/runs' # nothing is left to do

    def table(folder):
        "The lines of the front page's table, made beside the records of this folder."
        cell = next(cell for cell in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'] if cell['id']=='results-table')
        program = ''.join(cell['source']).replace('Markdown(', 'print(')
        environment = os.environ | dict(PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, '-c', program], cwd=folder, capture_output=True, text=True, check=True, env=environment)
        return [[line.split('|')[column].strip() for column in (2, 4, 7)] for line in done.stdout.splitlines() if line.startswith(('| `resnet-cifar', '| `--recipe'))]
    accuracy = [records['resnet18', seed]['result']['test_accuracy'] for seed in (0, 1)]
    lines = table(runs.parent)
    assert lines[0]==['network, epochs', 'test accuracy (%)', 'runs'] and [line[0] for line in lines[1:]]==[f'{name}, 1' for name in NETWORKS]
    assert lines[1][1:]==[f'{50*sum(accuracy):.2f} ± {100*abs(accuracy[0] - accuracy[1])/2**0.5:.2f}', '2']
    assert all('±' not in line[1] and line[2]=='1' for line in lines[2:])
    assert table(tmp_path)==[] # no record at all
