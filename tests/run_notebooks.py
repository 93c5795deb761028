"Runs notebooks as `nbdev_test` does, holds what they store to what they print now, and counts them: all of them or those that are named; with --save what they print is stored."
import base64
import difflib
import io
import itertools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_WARNINGS = dict(PYTHONWARNINGS=','.join(f'error::DeprecationWarning:resnet_cifar.{p.stem}' for p in ROOT.glob('resnet_cifar/*.py'))) # of ours
VOLATILE = re.compile(r'^#\|\s*volatile: true', re.M) # the cell prints what a training on this machine gave, which no other kind of machine repeats
NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?')


def shown(outputs)->str:
    "What a reader sees of a cell's outputs: text as it is, in however many pieces it came; of a picture that there is one."
    found = []
    for stream, some in itertools.groupby(outputs, lambda output: output.get('name', '') if output['output_type']=='stream' else None):
        if stream is not None: found.append(''.join(''.join(output['text']) for output in some))
        else: found += [kind if kind.startswith('image/') else f'{kind}: {"".join(content)}' for output in some for kind, content in sorted(output.get('data', {}).items())]
    return '\n'.join(found)


def same(stored:str, fresh:str, volatile:bool=False)->bool:
    "Equal texts; a number with a point may differ by two in a hundred, or in its last digits, as another processor rounds otherwise. Volatile: as many lines."
    if volatile: return len(stored.splitlines())==len(fresh.splitlines())
    if NUMBER.sub('#', stored)!=NUMBER.sub('#', fresh): return False
    return all(a==b or ('.' in a and math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=2*10**-len(a.partition('.')[2]))) for a, b in zip(NUMBER.findall(stored), NUMBER.findall(fresh)))


def check(path:Path, save:bool)->bool:
    "Run a notebook, print how many seconds that took and what is wrong with it: whether nothing is."
    import nbdev.test
    from nbdev.config import get_config
    stale, outputs = [], {}

    class Shell(nbdev.test.CaptureShell):
        def run_all(self, nb, preproc, **options):
            def skip(cell):
                if preproc(cell): return True
                cell.stored, cell['outputs'] = shown(cell.get('outputs', [])), []
            def compare(cell):
                fresh, outputs[cell.id] = shown(cell.outputs), cell.outputs
                if self.exc: stale.append(f'{path.name}, cell {cell.id}: failed')
                elif not save and not same(cell.stored, fresh, bool(VOLATILE.search(cell.source))):
                    stale.append(f'{path.name}, cell {cell.id}: its stored output is not what it prints: make save NB={path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}')
                    stale.extend(list(difflib.unified_diff(cell.stored.splitlines(), fresh.splitlines(), 'stored', 'fresh', lineterm='', n=0))[:20])
            super().run_all(nb, preproc=skip, postproc=compare, **options)

    nbdev.test.CaptureShell = Shell
    passed, seconds = nbdev.test.test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    print(f'{path.name}: {seconds:.0f} s', *stale, *([] if passed else ['failed']), sep='\n')
    if save and passed: store(path, outputs)
    return passed and not stale


def smaller(png:str)->str:
    "A plot with a palette of 256 colours, a third of the bytes; a picture that this would change, as it does photographs, stays as it is."
    from PIL import Image, ImageChops, ImageStat
    picture, buffer = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'), io.BytesIO()
    fewer = picture.quantize(dither=Image.Dither.NONE)
    if max(ImageStat.Stat(ImageChops.difference(picture, fewer.convert('RGB'))).mean) > 0.1: return png # of 255
    fewer.save(buffer, 'png', optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + '\n'


def store(path:Path, outputs:dict)->None:
    "Put outputs into the notebook as it lies there, and clean it."
    from execnb.nbio import read_nb, write_nb
    notebook = read_nb(path)
    for cell in notebook.cells:
        if cell.id not in outputs: continue
        cell.outputs = outputs[cell.id]
        for output in cell.outputs:
            data = output.get('data', {})
            if 'image/png' in data: data['image/png'] = smaller(''.join(data['image/png']))
    write_nb(notebook, path)
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', path], check=True)


def run(path:Path, *options)->bool:
    "The same in a process of its own; they run side by side, with one thread each."
    environment = os.environ | NO_WARNINGS | dict(OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    done = subprocess.run([sys.executable, __file__, '--this', path, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end='', flush=True)
    return done.returncode==0


if __name__=='__main__':
    options, named = [word for word in sys.argv[1:] if word.startswith('--')], [Path(word).absolute() for word in sys.argv[1:] if not word.startswith('--')]
    if '--this' in options: sys.exit(not check(named[0], '--save' in options))
    everything = sorted((p for p in ROOT.glob('nbs/**/*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts)), reverse=True) # the long ones first
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool: passed = list(pool.map(lambda path: run(path, *options), named or everything))
    print(f'notebooks: {sum(passed)} passed, {len(passed) - sum(passed)} failed')
    sys.exit(not all(passed))
