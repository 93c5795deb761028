"Runs `nbdev_test` over all notebooks and adds a line that counts them."
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_WARNINGS = dict(PYTHONWARNINGS=','.join(f'error::DeprecationWarning:resnet_cifar.{p.stem}' for p in ROOT.glob('resnet_cifar/*.py'))) # of ours

if __name__=='__main__':
    count = sum(not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts) for p in ROOT.glob('nbs/**/*.ipynb'))
    environment = os.environ | NO_WARNINGS | dict(OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}') # notebooks run side by side
    done = subprocess.run(['nbdev_test', '--timing'], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep='')
    named = re.findall(r'^\t(\S+\.ipynb)', done.stderr, re.M)
    failed = len(named) or (count if done.returncode else 0)
    print(f'notebooks: {count - failed} passed, {failed} failed')
    sys.exit(done.returncode)
