"Repository rules: the notebook is the source, and it is kept clean."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from readme import markdown

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in ROOT.glob('nbs/**/*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = {p.stem[3:]: p.stem[:2] for p in NOTEBOOKS if re.match(r'\d\d_', p.stem)}
BY_HAND = {'__init__.py', '__main__.py', '_modidx.py', 'plain_loop.py'}


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])


@pytest.fixture(scope='module')
def copy_of_tree(tmp_path_factory):
    "A copy without data and builds, in which nbdev may write."
    copy = tmp_path_factory.mktemp('tree')/'resnet_cifar'
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', 'data', 'checkpoints', '*.egg-info', 'build', 'dist', '__pycache__'))
    return copy


def test_export_is_in_sync(copy_of_tree):
    subprocess.run([Path(sys.executable).parent/'nbdev_export'], cwd=copy_of_tree, check=True)
    for module in sorted(ROOT.glob('resnet_cifar/*.py')):
        assert (copy_of_tree/'resnet_cifar'/module.name).read_text()==module.read_text(), f'{module.name} is not what the notebooks export: make export'
    assert {p.stem for p in ROOT.glob('resnet_cifar/*.py')} == set(CHAPTERS) | {Path(name).stem for name in BY_HAND}


def test_notebooks_are_clean(copy_of_tree):
    subprocess.run([Path(sys.executable).parent/'nbdev_clean'], cwd=copy_of_tree, check=True)
    for path in NOTEBOOKS:
        assert (copy_of_tree/path.relative_to(ROOT)).read_text()==path.read_text(), f'{path.name} is not clean: make export'


def test_readme_is_in_sync():
    index = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    assert markdown(index)==(ROOT/'README.md').read_text(encoding='utf-8'), 'README.md is not what index.ipynb makes: make export'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem!='index'], ids=lambda p: p.stem)
def test_import_cells_hold_imports_only(path):
    "nbdev executes every cell that imports something when it builds the site."
    for cell in cells(path):
        if cell['cell_type']!='code': continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source(cell)).body}
        assert kinds!={True, False}, cell['id']


def imported_chapters(code):
    "Names of our modules that a piece of code imports, in any spelling."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = 'resnet_cifar' + (f'.{node.module}' if node.module else '') if node.level else node.module
            modules = [f'{base}.{a.name}' for a in node.names] if base=='resnet_cifar' else [base]
        else: continue
        yield from (m.split('.')[1] for m in modules if m.startswith('resnet_cifar.') and m.split('.')[1] in CHAPTERS)


def test_imports_point_to_lower_numbers():
    spellings = 'from .blocks import x', 'from . import blocks', 'from resnet_cifar import blocks', 'import resnet_cifar.blocks as b', 'from resnet_cifar.blocks import x'
    for code in spellings: assert list(imported_chapters(code))==['blocks'], code
    assert 'config' in imported_chapters((ROOT/'resnet_cifar'/'training.py').read_text())
    for name, number in CHAPTERS.items():
        for other in imported_chapters((ROOT/'resnet_cifar'/f'{name}.py').read_text()): assert CHAPTERS[other] < number, f'{name} imports {other}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    for cell in cells(path):
        code = source(cell)
        where = f'{path.name}, cell {cell["id"]}'
        assert re.fullmatch(r'[a-zA-Z_][\w-]*', cell['id']), f'{where}: ids are words'
        if cell['cell_type']!='code': continue
        assert not re.search(r'^\s*from \S+ import \*', code, re.M), f'{where}: star import'
        outputs = json.dumps(cell['outputs'])
        assert not any(o['output_type']=='error' for o in cell['outputs']), f'{where}: stored error'
        leaks = [word for word in ('/home/', '/root/', '/tmp/', '/work/', '/Users/', 'Warning') if word in outputs]
        assert not leaks, f'{where}: output holds {leaks}'
        lines = sum(bool(line.strip()) and not line.startswith('#|') for line in code.splitlines())
        if re.match(r'#\|\s*exports?\b', code) and cell['id']!='TrainConfig': assert lines <= 40, f'{where}: {lines} lines' # that one is a list: a line for each setting
    assert path.stat().st_size < 400_000, f'{path.name} is {path.stat().st_size/1000:.0f} kB'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem[:2].isdigit()], ids=lambda p: p.stem)
def test_chapter_ends_with_a_tested_solution(path):
    ids = [cell['id'] for cell in cells(path)]
    assert ids[-3:]==['recap', 'exercise', 'exercise-test']
    exercise, check = (source(cell) for cell in cells(path)[-2:])
    solution = re.search(r'<details>.*?```python\n(.*?)```.*?</details>', exercise, re.S).group(1).strip()
    assert solution in check, 'the solution that readers see is not the one that is tested'
    assert 'test_' in check.replace('#| hide', '')


def test_relative_links_lead_somewhere():
    texts = [(ROOT, (ROOT/'README.md').read_text())] + [(path.parent, source(c)) for path in NOTEBOOKS for c in cells(path) if c['cell_type']=='markdown']
    links = [(folder, link) for folder, text in texts for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', text)]
    assert len(links) > 20
    assert [link for folder, link in links if not (folder/link).exists()]==[]


def test_figures_have_alt_texts():
    for path in NOTEBOOKS:
        for cell in cells(path):
            if any('image/' in kind for output in cell.get('outputs', []) for kind in output.get('data', {})):
                assert '#| fig-alt:' in source(cell) and '#| fig-cap:' in source(cell), f'{path.name}, cell {cell["id"]}'


def test_ruff():
    subprocess.run([sys.executable, '-m', 'ruff', 'check', '--quiet'], cwd=ROOT, check=True)
