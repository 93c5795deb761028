"The package as users get it: built, installed away from the checkout, silent on import."
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p.stem for p in ROOT.glob('resnet_cifar/*.py') if not p.stem.startswith('_'))
TORCHLESS = ('fetch', 'config', 'files', 'cli')
BLOCK = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('fastcore', 'nbdev', 'IPython', 'execnb'): raise ImportError('not there: ' + name)
sys.meta_path.insert(0, Block())
'''


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The wheel, unpacked where only it is, without the tools that the book is written with."
    folder = tmp_path_factory.mktemp('wheel')
    tree = shutil.copytree(ROOT, folder/'tree', symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', 'data', 'checkpoints', '*.egg-info', '_docs', '_proc', '.*_cache', '__pycache__'))
    subprocess.run([sys.executable, '-m', 'build', '--outdir', folder, tree], check=True, capture_output=True) # the archive of sources, and the wheel from it
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder/'site', *folder.glob('*.whl')], check=True)
    (folder/'site'/'sitecustomize.py').write_text(BLOCK)
    return folder/'site'


def python(installed, code, *words):
    return subprocess.run([sys.executable, *(['-c', code] if code else []), *words], cwd=installed.parent, env=os.environ | dict(PYTHONPATH=str(installed)), capture_output=True, text=True)


@pytest.mark.parametrize('modules, heavy', [([], ['torch', 'matplotlib', 'numpy']), (TORCHLESS, ['torch', 'matplotlib']), (MODULES, ['matplotlib'])], ids=['package', 'without torch', 'all'])
def test_imports_are_silent(installed, modules, heavy):
    "Nothing is printed, nothing big is loaded that is not needed, and PyTorch's settings stay as they are."
    names = ', '.join(['resnet_cifar', *(f'resnet_cifar.{module}' for module in modules)])
    done = python(installed, f'''
import sys, {names}
assert {str(installed)!r} in resnet_cifar.__file__, resnet_cifar.__file__
assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)
if 'torch' in sys.modules:
    import torch
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
''')
    assert (done.returncode, done.stdout, done.stderr)==(0, '', '')


def test_sample_and_types_are_inside(installed):
    assert {p.name for p in (installed/'resnet_cifar').rglob('*')} >= {'py.typed', 'train.png', 'test.png', 'report.html', 'resnet20.safetensors'}
    assert sum(p.stat().st_size for p in (installed/'resnet_cifar'/'sample').iterdir()) < 4_000_000
    done = python(installed, 'from resnet_cifar.data import sample_cifar10; print(sample_cifar10().train_labels.bincount().tolist())')
    assert done.stdout.strip()==str([100]*10)


@pytest.mark.parametrize('module', MODULES)
def test_everything_public_has_types(module):
    "Parameters and results of every public function and method."
    module, bare = importlib.import_module(f'resnet_cifar.{module}'), []
    for name in module.__all__:
        public = getattr(module, name)
        methods = [(f'{name}.{k}', f) for k, f in vars(public).items() if inspect.isfunction(f) and (k=='__init__' or not k.startswith('_'))] if inspect.isclass(public) else []
        for label, function in [(name, public)]*inspect.isfunction(public) + [m for m in methods if not is_generated(m[1])]:
            signature = inspect.signature(function)
            named = [p for p in signature.parameters.values() if p.name!='self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            bare += [f'{label}({p.name})' for p in named if p.annotation is p.empty]
            if signature.return_annotation is signature.empty and not label.endswith('__init__'): bare.append(f'{label} -> ?')
    assert bare==[]


def is_generated(function): return function.__code__.co_filename.startswith('<') # by dataclass or NamedTuple


def test_wheel_trains(installed, cifar10_root, tmp_path):
    done = python(installed, None, '-m', 'resnet_cifar.trainer', '--root', str(cifar10_root), '--ckpt_dir', str(tmp_path/'run'), '--width', '8', # narrower channels_last networks crash in oneDNN on processors with AVX2 alone (PyTorch 2.14)
                  '--limit_train', '256', '--limit_test', '100', '--valid_size', '100', '--num_epochs', '1')
    assert done.returncode==0, done.stderr
    assert 'test accuracy' in done.stdout
