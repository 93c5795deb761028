"Repository rules: the notebook is the source, and it is kept clean."
import ast
import base64
import dataclasses
import importlib
import inspect
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from readme import FIGURES, figures, markdown
from run_notebooks import same, shown, smaller

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
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', 'data', 'checkpoints', '*.egg-info', 'build', 'dist', '_docs', '_proc', '.*_cache', '__pycache__'))
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
    assert {path.stem: path.read_bytes() for path in (ROOT/FIGURES).iterdir()}==figures(index)


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
        assert re.fullmatch(r'[a-zA-Z_][\w-]*', cell['id']) and not re.fullmatch(r'[0-9a-f]{8}(-[0-9a-f-]{27})?', cell['id']), f'{where}: ids are words; JupyterLab cannot change one: tests/name_cell.py'
        if cell['cell_type']!='code': continue
        assert not re.search(r'^\s*from \S+ import \*', code, re.M), f'{where}: star import'
        outputs = json.dumps(cell['outputs'])
        assert not any(o['output_type']=='error' for o in cell['outputs']), f'{where}: stored error'
        leaks = [word for word in ('/home/', '/root/', '/tmp/', '/work/', '/Users/', 'Warning') if word in outputs]
        assert not leaks, f'{where}: output holds {leaks}'
        lines = sum(bool(line.strip()) and not line.startswith('#|') for line in code.splitlines())
        if re.match(r'#\|\s*exports?\b', code) and cell['id']!='TrainConfig': assert lines <= 40, f'{where}: {lines} lines, an export cell has at most 40: begin another one' # that one is a list: a line for each setting
    assert path.stat().st_size < 400_000, f'{path.name} is {path.stat().st_size/1000:.0f} kB'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem not in ('index', 'references')], ids=lambda p: p.stem)
def test_page_ends_with_a_tested_solution(path):
    ids = [cell['id'] for cell in cells(path)]
    assert ids[-3:]==['recap', 'exercise', 'exercise-test']
    exercise, check = (source(cell) for cell in cells(path)[-2:])
    solution = re.search(r'<details>.*?```python\n(.*?)```.*?</details>', exercise, re.S).group(1).strip()
    assert solution in check, 'the solution that readers see is not the one that is tested'
    assert 'test_' in check.replace('#| hide', '')


def test_stale_outputs_are_noticed(tmp_path):
    assert same('loss 0.512, 3 of 10', 'loss 0.513, 3 of 10') and not same('loss 0.512', 'loss 0.612') and not same('3', '2') and not same('a cat', 'a dog')
    assert same('3 of 10\ncat', '4 of 10\ndog', volatile=True) and not same('3 of 10', '', volatile=True)
    picture = dict(output_type='display_data', data={'image/png': 'abc', 'text/plain': '<Figure>'})
    assert shown([dict(output_type='stream', text=['a\n', 'b'])]).splitlines()==['a', 'b'] and shown([picture]).splitlines()==['image/png', 'text/plain: <Figure>']
    assert shown([dict(output_type='stream', name='stdout', text=['a']), dict(output_type='stream', name='stdout', text=['b'])])=='ab' # a kernel sends text in pieces
    for stored, failed in (('2', False), ('3', True)):
        output = dict(output_type='execute_result', data={'text/plain': [stored]}, execution_count=None, metadata={})
        cell = dict(cell_type='code', id='sum', source=['1 + 1'], outputs=[output], execution_count=None, metadata={})
        (tmp_path/'sums.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
        done = subprocess.run([sys.executable, ROOT/'tests'/'run_notebooks.py', tmp_path/'sums.ipynb'], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, 'cell sum' in done.stdout)==(failed, failed), done.stdout + done.stderr


def test_figures_are_sharp():
    "Twice as many pixels as they are wide on the page: so `make save` stores them, and a plain kernel does not."
    for path in NOTEBOOKS:
        for cell in cells(path):
            for output in cell.get('outputs', []):
                if not (png := ''.join(output.get('data', {}).get('image/png', ''))): continue
                pixels, width = int.from_bytes(base64.b64decode(png)[16:20], 'big'), output['metadata'].get('image/png', {}).get('width', math.inf)
                assert pixels >= 2*width, f'{path.name}, cell {cell["id"]}: make save'


def test_plots_get_a_palette_and_photographs_none():
    def png(picture):
        buffer = io.BytesIO()
        picture.save(buffer, 'png')
        return base64.b64encode(buffer.getvalue()).decode()
    plot = png(Image.linear_gradient('L').convert('RGB')) # 256 greys
    photograph = png(Image.merge('RGB', [Image.effect_noise((64, 64), 90) for _ in range(3)]))
    assert Image.open(io.BytesIO(base64.b64decode(smaller(plot)))).mode=='P' and smaller(photograph)==photograph


def test_naming_a_cell(tmp_path):
    copy = tmp_path/'blocks.ipynb'
    shutil.copy(ROOT/'nbs'/'00_blocks.ipynb', copy)
    def name(*words): return subprocess.run([sys.executable, ROOT/'tests'/'name_cell.py', copy, *words], capture_output=True, text=True)
    assert name('conv3x3', 'kernel').returncode==0 # not conv3x3-use
    assert copy.read_text()==(ROOT/'nbs'/'00_blocks.ipynb').read_text().replace('"id": "conv3x3"', '"id": "kernel"')
    for words, said in ((('kernel', 'basic'), 'has a cell basic already'), (('conv1x1-', 'x'), '2 cells'), (('nothing', 'x'), '0 cells')):
        done = name(*words)
        assert done.returncode==1 and said in done.stderr


def test_every_page_is_in_the_book():
    "In the site's sidebar and on the front page, in one order."
    pages = [str(path.relative_to(ROOT/'nbs')) for path in NOTEBOOKS]
    sidebar = re.findall(r'- (\S+\.ipynb)', (ROOT/'_quarto.yml').read_text())
    front = re.findall(r'^\| \[[\w/]+\]\((\S+\.ipynb)\) \|', ''.join(source(c) + '\n' for c in cells(ROOT/'nbs'/'index.ipynb') if c['cell_type']=='markdown'), re.M)
    assert sorted(sidebar)==sorted(pages) and ['index.ipynb', *front, 'references.ipynb']==sidebar


def test_every_setting_is_read():
    "By code of another module than the one that lists them; some by the name of their flag in a tuple or call there."
    from resnet_cifar.config import TrainConfig
    code = '\n'.join(path.read_text() for path in ROOT.glob('resnet_cifar/*.py') if path.stem not in ('config', '_modidx'))
    unread = [field.name for field in dataclasses.fields(TrainConfig) if not re.search(rf"\.{field.name}\b|'{field.name}'", code)]
    assert unread==[]


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


def test_what_is_cited_is_listed_and_what_is_listed_is_cited():
    papers = lambda text: set(re.findall(r'(?:arXiv:|arxiv\.org/abs/)(\d{4}\.\d{5})', text))
    texts = {path.stem: '\n'.join(map(source, cells(path))) for path in NOTEBOOKS}
    listed = papers(texts.pop('references'))
    assert len(listed) > 10 and listed==set().union(*map(papers, texts.values()))


def undocumented(thing):
    "What a reader of the API reference would miss of a function or class: its sentence, a comment for each parameter, for what comes back, for each field."
    from fastcore.docments import docments
    own = thing.__doc__ or ''
    if not own.strip() or own.startswith(f'{thing.__name__}('): yield 'docstring'
    if inspect.isclass(thing):
        if hasattr(thing, '_fields') or dataclasses.is_dataclass(thing): # each field has a line with a comment, or is inherited
            lines = inspect.getsource(thing).splitlines()
            for name in vars(thing).get('__annotations__', {}):
                if not any(re.match(rf'\s+{name}\s*:.*#', line) for line in lines): yield name
            return
        for name, method in vars(thing).items():
            method = getattr(method, '__func__', method)
            if inspect.isfunction(method) and (name=='__init__' or not name.startswith('_')):
                if name!='__init__' and not method.__doc__: yield f'{name}: docstring'
                yield from (f'{name}: {parameter}' for parameter in undocumented_parameters(docments(method)))
        return
    found = docments(thing, returns=True)
    yield from undocumented_parameters(found)
    answer = inspect.signature(thing).return_annotation
    if found.get('return') is None and (answer in (dict, list, tuple, float, int, str) or 'Tensor' in str(answer) or str(answer).startswith(('tuple', 'dict', 'list'))): yield 'return'


def undocumented_parameters(found): # a `TrainState` says what it is; of `**kwargs` the comment is not read
    return [name for name, comment in found.items() if comment is None and name not in ('self', 'return', 'state', 'kwargs')]


@pytest.mark.parametrize('name', CHAPTERS)
def test_exported_names_are_documented(name):
    module = importlib.import_module(f'resnet_cifar.{name}')
    things = [getattr(module, n) for n in module.__all__]
    things = [thing for thing in things if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, BaseException))]
    assert things and {thing.__name__: missing for thing in things if (missing := list(undocumented(thing)))}=={}


def test_what_is_not_documented_is_noticed():
    def bare(images, size=3)->dict:
        "It does something."
    def told(
        images, # uint8 (N, 3, H, W)
    )->dict:    # of everything
        "It does something."
    class Silent:
        "It is quiet."
        def forward(self, x): return x
    assert (list(undocumented(bare)), list(undocumented(told)), list(undocumented(Silent)))==(['images', 'size', 'return'], [], ['forward: docstring', 'forward: x'])


def test_workflows_call_make():
    targets = re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M)
    commands = [command for path in ROOT.glob('.github/workflows/*.yml') for command in re.findall(r'\brun: *(.*)', path.read_text())]
    assert commands and set(commands) <= {f'make {target}' for target in targets}


def test_ruff():
    subprocess.run([sys.executable, '-m', 'ruff', 'check', '--quiet'], cwd=ROOT, check=True)
