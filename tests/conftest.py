"Shared by the tests: a folder with the real CIFAR-10, the command as a program, and no silent skips in CI."
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from run_notebooks import NO_WARNINGS

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
collect_ignore = ['test_site.py'] if sys.version_info < (3, 11) else [] # what renders the site needs 3.11
signal.signal(signal.SIGINT, signal.default_int_handler) # in a shell's background it is ignored, and would be in every program that the tests start


@pytest.fixture(autouse=True, scope='session')
def git_of_its_own():
    "Tests that make a repository do not take the settings of whoever runs them, nor the repository whose hook runs them."
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM='1')
    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'): os.environ.pop(name, None)


@pytest.fixture(scope='session')
def cifar10_root():
    "The folder `make train` uses; fetched when missing."
    from resnet_cifar.fetch import download_cifar10
    return download_cifar10(ROOT/'data'/'datasets')


def pack_batches(arrays, path, mode, **options):
    "The arrays of `read_cifar10` as an archive in the official form."
    rows = {part: np.ascontiguousarray(arrays[f'{part}_images'].transpose(0, 3, 1, 2)).reshape(-1, 3072) for part in ('train', 'test')}
    parts = {f'data_batch_{i + 1}': ('train', slice(i*10000, (i + 1)*10000)) for i in range(5)} | {'test_batch': ('test', slice(None))}
    with tarfile.open(path, mode, **options) as tar:
        for name, (part, places) in parts.items():
            content = pickle.dumps({b'data': rows[part][places], b'labels': arrays[f'{part}_labels'][places].tolist()}, protocol=3)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def command(tmp_path):
    "Run `python -m …` as a program in an empty folder: its return code and what it printed."
    def run(*words, code=0, timeout=900, **environment):
        done = subprocess.run([sys.executable, '-m', *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=os.environ | NO_WARNINGS | environment)
        assert done.returncode==code, f'{words}: {done.returncode}\n{done.stdout}\n{done.stderr}'
        return done
    return run


def pytest_sessionfinish(session, exitstatus):
    "A skipped test is a failure when CI is set."
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if os.environ.get('CI') and reporter and reporter.stats.get('skipped'): session.exitstatus = 1
