"Shared by the tests: a folder with the real CIFAR-10, the command as a program, and no silent skips in CI."
import os
import subprocess
import sys
from pathlib import Path

import pytest

from run_notebooks import NO_WARNINGS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def cifar10_root():
    "The folder `make train` uses; fetched when missing."
    from resnet_cifar.fetch import download_cifar10
    return download_cifar10(ROOT/'data'/'datasets')


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
