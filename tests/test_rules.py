"Repository rules: the notebook is the source, it is kept clean, and its code stays readable."
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
PAGES = {p.stem[3:]: p for p in NOTEBOOKS if re.match(r'\d\d_', p.stem)} # chapters, by the name of their module
MODULES = sorted(p.stem for p in ROOT.glob('resnet_cifar/*.py') if not p.stem.startswith('_'))
LAZY = {('models', 'weights')} # `create_model(weights=…)` reads a file only when it is asked to
PART_ONE_MAY_IMPORT = {'archives', 'config', 'facts', 'files', 'flags', 'workers'} # of Part II


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])


@pytest.fixture(scope='module')
def copy_of_tree(tmp_path_factory):
    "A copy without data and builds, in which nbdev may write."
    copy = tmp_path_factory.mktemp('tree')/'resnet_cifar'
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', 'data', 'checkpoints', '*.egg-info', '_docs', '_proc', '.*_cache', '__pycache__'))
    return copy


def test_export_is_in_sync(copy_of_tree):
    subprocess.run([Path(sys.executable).parent/'nbdev_export'], cwd=copy_of_tree, check=True)
    for module in sorted(ROOT.glob('resnet_cifar/*.py')):
        assert (copy_of_tree/'resnet_cifar'/module.name).read_text()==module.read_text(), f'{module.name} is not what the notebooks export: make export'
    texts = '\n'.join(source(cell) for path in PAGES.values() for cell in cells(path))
    assert set(MODULES)==set(re.findall(r'^#\|\s*(?:default_exp|exports?)[ ]+(\w+)', texts, re.M))


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


def imported_modules(code):
    "(module of ours, names taken from it) for each import in a piece of code, in any spelling."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): found = [(a.name, []) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = 'resnet_cifar' + (f'.{node.module}' if node.module else '') if node.level else node.module
            names = [a.name for a in node.names]
            found = [(f'{base}.{name}', []) for name in names] if base=='resnet_cifar' else [(base, names)]
        else: continue
        for module, names in found:
            if module.startswith('resnet_cifar.') and module.split('.')[1] in MODULES: yield module.split('.')[1], names


def imports(name): return list(imported_modules((ROOT/'resnet_cifar'/f'{name}.py').read_text(encoding='utf-8')))


def test_spellings_of_imports():
    spellings = 'from .blocks import x', 'from . import blocks', 'from resnet_cifar import blocks', 'import resnet_cifar.blocks as b', 'from resnet_cifar.blocks import x'
    for code in spellings: assert [module for module, _ in imported_modules(code)]==['blocks'], code


def test_imports_make_no_circle():
    "Each module can be put below all that import it; the command line stands on top, and imports what a command needs inside it."
    arrows = {name: {module for module, _ in imports(name) if module!=name and (name, module) not in LAZY} for name in MODULES}
    arrows['trainer'] -= {'cli'} # `python -m resnet_cifar.trainer` hands its words to the command `train`
    left = dict(arrows)
    while left:
        ground = [name for name, below in left.items() if not below & left.keys()]
        assert ground, f'these import each other: {left}'
        for name in ground: del left[name]


def test_part_one_needs_little_of_part_two():
    part_two = {name for name, path in PAGES.items() if path.parent.name=='build'}
    for name, path in PAGES.items():
        if path.parent.name!='learn' or name not in MODULES: continue
        needed = {module for module, _ in imports(name) if (name, module) not in LAZY} & part_two
        assert needed <= PART_ONE_MAY_IMPORT, f'{name} imports {needed - PART_ONE_MAY_IMPORT}'


def test_no_module_imports_a_private_name():
    for name in MODULES:
        private = [f'{module}.{word}' for module, names in imports(name) for word in names if word.startswith('_')]
        code = (ROOT/'resnet_cifar'/f'{name}.py').read_text(encoding='utf-8')
        private += re.findall(rf'\b(?:{"|".join(MODULES)})\._[a-z]\w*', code)
        assert private==[], name


def test_modules_are_short():
    "At most 250 lines each; together 4,000 is the aim, and until then the sum may only shrink."
    lines = {name: len((ROOT/'resnet_cifar'/f'{name}.py').read_text(encoding='utf-8').splitlines()) for name in MODULES}
    assert {name: n for name, n in lines.items() if n > 250}=={}
    assert sum(lines.values()) <= 5980


def code_of(cell): return [line for line in source(cell).splitlines() if line.strip() and not line.lstrip().startswith('#')]


def kind(cell):
    "How a reader of the site meets a code cell: 'definition', 'demonstration', or 'hidden'."
    text = source(cell)
    if re.search(r'^#\|\s*(hide|default_exp|include:\s*false|echo:\s*false)', text, re.M): return 'hidden'
    is_export = bool(re.search(r'^#\|\s*exports?\b', text, re.M))
    defines = any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(text).body)
    if is_export and not defines and not re.search(r'^#\|\s*exports\b', text, re.M): return 'hidden' # imports
    return 'definition' if is_export else 'demonstration'


def body_lines(function):
    "The lines of a function without its signature, its docstring, comments and blank lines."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return {line for statement in body for line in range(statement.lineno, statement.end_lineno + 1)}


def definition_lines(node):
    if isinstance(node, ast.FunctionDef): return len(body_lines(node))
    return len(set().union(*(body_lines(f) if isinstance(f, ast.FunctionDef) else range(f.lineno, f.end_lineno + 1) for f in node.body)))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_shown_code_fits_the_page(path):
    "88 columns; in Part I a demonstration has at most 15 lines and a definition 30."
    for cell in cells(path):
        if cell['cell_type']!='code' or kind(cell)=='hidden': continue
        where, text = f'{path.name}, cell {cell["id"]}', source(cell)
        if not re.search(r'^#\|\s*export\b', text, re.M):
            wide = [line for line in text.splitlines() if len(line) > 88 and not line.startswith('#|')]
            assert wide==[], f'{where}: more than 88 columns'
        if path.parent.name!='learn': continue
        is_plot = '#| code-fold: true' in text
        if kind(cell)=='demonstration' and not is_plot: assert len(code_of(cell)) <= 15, f'{where}: {len(code_of(cell))} lines, a demonstration has at most 15'
        for node in ast.parse(text).body:
            if kind(cell)=='definition' and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not dataclasses_like(node):
                assert definition_lines(node) <= 30, f'{where}: {node.name} has {definition_lines(node)} lines, a definition has at most 30'


def dataclasses_like(node): return isinstance(node, ast.ClassDef) and not any(isinstance(f, ast.FunctionDef) for f in node.body)


@pytest.mark.parametrize('path', list(PAGES.values()), ids=lambda p: p.stem)
def test_there_is_a_sentence_between_cells(path):
    "In Part I between any two shown code cells, but a definition and its use; in Part II after two."
    run = []
    for cell in cells(path):
        if cell['cell_type']=='markdown': run = []
        elif kind(cell)!='hidden':
            run.append((kind(cell), cell['id']))
            kinds = [k for k, _ in run]
            allowed = len(run) < 3 if path.parent.name=='build' else len(run)==1 or kinds==['definition', 'demonstration']
            assert allowed, f'{path.name}: no sentence between {", ".join(name for _, name in run)}'


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
    shutil.copy(PAGES['blocks'], copy)
    def name(*words): return subprocess.run([sys.executable, ROOT/'tests'/'name_cell.py', copy, *words], capture_output=True, text=True)
    assert name('conv3x3', 'kernel').returncode==0 # not conv3x3-use
    assert copy.read_text()==(PAGES['blocks']).read_text().replace('"id": "conv3x3"', '"id": "kernel"')
    for words, said in ((('kernel', 'basic'), 'has a cell basic already'), (('conv1x1-', 'x'), '2 cells'), (('nothing', 'x'), '0 cells')):
        done = name(*words)
        assert done.returncode==1 and said in done.stderr


def test_every_page_is_in_the_book():
    "In the site's sidebar and on the front page, in one order."
    pages = [str(path.relative_to(ROOT/'nbs')) for path in NOTEBOOKS]
    sidebar = re.findall(r'- (\S+\.ipynb)', (ROOT/'_quarto.yml').read_text())
    front = re.findall(r'^\| \[[^\]]+\]\((\S+\.ipynb)\) \|', ''.join(source(c) + '\n' for c in cells(ROOT/'nbs'/'index.ipynb') if c['cell_type']=='markdown'), re.M)
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


@pytest.mark.parametrize('name', MODULES)
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
    "By the settings in pyproject.toml; the lines of `__all__` are nbdev's and may be longer than 100 columns."
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'json'], cwd=ROOT, capture_output=True, text=True)
    found = []
    for fault in json.loads(done.stdout):
        path, row = Path(fault['filename']), fault['location']['row']
        above = path.read_text(encoding='utf-8').splitlines()[:row]
        is_listing = path.parent.name=='resnet_cifar' and re.search(r"^__all__ = \[[^\]]*$", '\n'.join(above)[:-1], re.M)
        if not (fault['code']=='E501' and is_listing): found.append(f"{path.name}:{row}: {fault['code']} {fault['message']}")
    assert found==[]
