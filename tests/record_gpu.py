"Records the recipe `resnet18` for all five sizes on this machine's GPU, in pieces: call it again until all is there."
import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from resnet_cifar.config import RECIPES

ROOT = Path(__file__).parent.parent
RUNS = [('resnet18', 0), ('resnet18', 1), ('resnet34', 0), ('resnet50', 0), ('resnet101', 0), ('resnet152', 0)] # network, seed
NETWORKS = list(dict(RUNS))
RECIPE = RECIPES['resnet18']


def stopped_after(words:list, seconds:float)->bool:
    "Run `python -m resnet_cifar …`; when the time is over, ask it to save and stop. Whether it had to."
    words = [str(word) for word in words]
    process = subprocess.Popen([sys.executable, '-m', 'resnet_cifar', *words], cwd=ROOT)
    try:
        code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        code = None
    finally: # also when this program is stopped
        if process.poll() is None: process.terminate()
        process.wait()
    if code is None and process.returncode in (143, -signal.SIGTERM): return True # the latter before it could listen
    if process.returncode: sys.exit(f'error: ended with {process.returncode}: {" ".join(words)}')
    return False


def relative_pixels(num_epochs:int, sizes:tuple)->float:
    "Pixels of all epochs' images, in epochs of 32x32: what they cost."
    if not sizes: return num_epochs
    return sum((sizes[min(epoch, len(sizes) - 1)]/32)**2 for epoch in range(num_epochs))


def choose_epochs(images_per_second:dict, minutes:float)->int:
    "The largest number of epochs, the same for all networks, with which all runs fit into so many minutes."
    epoch = sum(50000/images_per_second[name] for name, _ in RUNS) # seconds at 32x32, one of each run
    fitting = [n for n in range(1, 201) if epoch*relative_pixels(n, RECIPE.image_sizes) <= 60*minutes]
    if not fitting: sys.exit(f'error: an epoch of all runs takes {epoch:.0f} s here, more than --minutes {minutes} allow')
    return fitting[-1]


def measure(name:str, root:str, path:Path, seconds:float)->None:
    "Write the speed of a network; without the time for it, stop."
    words = ['bench', '--model_name', name, '--batch_size', RECIPE.batch_size, '--root', root, '--no_compile', '--json', path]
    if stopped_after(words, seconds): sys.exit(f'stopped: {path.name} is not measured yet; the same command resumes')


def train(label:str, flags:list, seconds:float)->None:
    "Train and record one run; without the time for it, save and stop."
    folder = f'checkpoints/{label}'
    words = ['train', '--recipe', 'resnet18', '--ckpt_dir', folder, '--resume', 'auto', *flags]
    if stopped_after(words, seconds): sys.exit(f'stopped within {label}; the same command resumes')
    if stopped_after(['record', folder], 600): sys.exit(f'stopped: {label} is trained but not recorded; the same command records it')


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=14.,
                        help="of all trainings together, by the speed of SGD's steps; Muon's take a little longer (default: %(default)s)")
    parser.add_argument('--piece', type=float, default=8.5, help='minutes after which this call stops (default: %(default)s)')
    parser.add_argument('--root', default='data/datasets', help='folder of the data')
    known, more = parser.parse_known_args() # the rest goes to each training
    if '--device' not in more and not torch.cuda.is_available(): sys.exit('error: no CUDA GPU here; --device cpu tries it without')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    end, runs = time.monotonic() + 60*known.piece, ROOT/'nbs'/'runs'
    speeds = {name: runs/f'gpu-bench-{name}.json' for name in NETWORKS}
    for name, path in speeds.items():
        if not path.exists(): measure(name, known.root, path, end - time.monotonic())
    epochs = choose_epochs({name: json.loads(path.read_text())['images_per_second'] for name, path in speeds.items()}, known.minutes)
    print(f'{epochs} epochs', flush=True)
    for name, seed in RUNS:
        label = f'gpu-{name}-{seed}'
        if (runs/f'{label}.json').exists(): continue
        train(label, ['--model_name', name, '--random_seed', seed, '--num_epochs', epochs, '--root', known.root, *more], end - time.monotonic())
    print('all runs are recorded in nbs/runs')
