"The command line: one line for what is wrong, the documented exit code, nothing left behind, and no PyTorch before it is needed."
import dataclasses
import importlib.util
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from resnet_cifar import trainer
from resnet_cifar.cli import COMMANDS, main
from resnet_cifar.config import RunFlags, TrainConfig
from resnet_cifar.data import CLASSES, sample_cifar10
from resnet_cifar.evaluation import pick_device
from resnet_cifar.flags import comments_of
from resnet_cifar.models import create_model
from resnet_cifar.weights import save_weights

ROOT = Path(__file__).parent.parent
ABSENT = 'cuda' if sys.platform=='darwin' else 'mps' # a device that this machine cannot have
WRONG = [ # words, what the line must say: nothing of these needs PyTorch
    ('trian', 'unknown command trian; did you mean train?'), ('xyzzy', 'unknown command xyzzy; Commands are download, train'),
    ('train --batchsize 3', '--batchsize: no such flag; did you mean --batch_size? `resnet-cifar train --help` lists all flags'),
    ('train --lr nan', '--lr nan: must be from'), ('train --model_name ResNet19', '--model_name resnet19: must be one of resnet18'),
    ('train --recipe quik', '--recipe quik: must be one of speedrun, resnet18'), ('train --config nowhere.toml', '--config nowhere.toml: not a TOML file'),
    ('train --valid_size 5001', '--valid_size 5001: must be a multiple of 10'), ('train --limit_train 10 --batch_size 32', 'leave only 10 training images'),
    ('train --shortcut B --model_name plain20', '--shortcut B: plain20 has no shortcuts; leave it out, or take resnet20'),
    ('train --precision fp16', '--precision fp16: must be one of auto, fp32, bf16'), ('train stray', 'stray: no such flag'),
    ('download --sauce x', 'did you mean --source?'), ('evaluate', 'the following arguments are required: --ckpt'),
    ('evaluate --ckpt x --limit_test 0', '--limit_test 0: must be from 1 to 10000'), ('evaluate --ckpt x --report a_file', '--report a_file: a_file is a file'),
    ('predict', 'the following arguments are required: images'), ('predict nowhere.jpg a_file', "'nowhere.jpg': no such file or folder"),
    ('predict a_file --top_k 0', '--top_k 0: must be from 1'), ('predict a_file --topk 3', 'did you mean --top_k?'),
    ('predict a_file --explain a_file', '--explain a_file: a_file is a file'), ('export', 'required: --ckpt'),
    ('export --ckpt x --output x.pt', '--output x.pt: must end in .safetensors'),
    ('export --ckpt x --output nowhere/x.safetensors', 'must be a file in a folder that exists'),
    ('export --ckpt x --softmax', '--normalize and --softmax: only with --format onnx'),
    ('export --ckpt x --format onx', '--format onx: must be one of safetensors, onnx'),
    ('export --ckpt x --output hundred.safetensors', '--output hundred.safetensors exists: --overwrite replaces it'),
    ('info ResNet19', 'no network resnet19: did you mean resnet1'), ('info --image_size 2', '--image_size 2: must be from 9'),
    ('info --run', 'did you mean --runs?'),
    ('bench --model_name resnet20', '--model_name resnet20: must be one of resnet18, resnet34'), ('bench --batch_size 0', '--batch_size 0: must be from 1'),
    ('bench --json numbers.txt', '--json numbers.txt: must end in .json'), ('record', 'required: runs'), ('record a b --name c', '--name: is for a single run'),
]
BAD = [ # words, exit code, what the line must say
    (f'train --device {ABSENT}', 2, f'--device {ABSENT}'), ('train --root a_file', 2, 'is a file'), ('train --root a_file/below', 2, 'is a file'),
    ('train --ckpt_dir a_file', 2, 'is a file'), ('train --resume nowhere', 2, '--resume nowhere'),
    ('download --root a_file', 2, 'is a file'), ('download --archive nowhere.tar.gz', 2, 'no such file'), ('download --archive a_file', 2, 'damaged'),
    ('download --source https://127.0.0.1:9/cifar-10-python.tar.gz', 1, 'could not be fetched'),
    ('download --source http://example.org/cifar.tar.gz', 2, 'https'),
    ('evaluate --ckpt nowhere', 2, 'nowhere'), ('evaluate --ckpt a_file', 2, 'a_file is damaged'),
    ('evaluate --ckpt photo.safetensors', 2, 'photo.safetensors is damaged'),
    ('evaluate --ckpt empty.safetensors', 2, 'empty.safetensors is damaged'), ('evaluate --ckpt empty.ckpt', 2, 'empty.ckpt is damaged'),
    ('evaluate --ckpt hundred.safetensors', 2, "its classes are not CIFAR-10's"), ('evaluate --ckpt alexnet.safetensors', 2, 'alexnet.safetensors'),
    ('evaluate --ckpt DEFAULT --root a_file', 2, 'is a file'), ('predict --ckpt hundred.safetensors .', 2, '.'),
    ('predict --ckpt hundred.safetensors a_file', 1, 'a_file'),
    ('predict --ckpt photo.safetensors a_file', 2, 'photo.safetensors is damaged'), ('export --ckpt photo.safetensors', 2, 'photo.safetensors is damaged'),
    ('export --ckpt nowhere', 2, 'nowhere'), ('info --runs', 2, 'holds no record of a run'), ('info --runs a_file', 2, 'holds no record of a run'),
    ('bench --root a_file', 2, 'is a file'), ('record nowhere', 2, 'nowhere: holds no finished run'), (f'bench --device {ABSENT}', 2, f'--device {ABSENT}'),
]


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    "Files that are not what they are called, and weights that are of something else."
    folder = tmp_path_factory.mktemp('material')
    (folder/'a_file').write_text('no folder, no archive, no checkpoint')
    (folder/'photo.safetensors').write_bytes(b'\xff\xd8\xff\xe0\x00\x10JFIF\x00' + bytes(range(256))*8)
    for name in ('empty.safetensors', 'empty.ckpt'): (folder/name).touch()
    save_weights(create_model('resnet20', 100, width=4), folder/'hundred.safetensors')
    save_file({'features.0.weight': torch.zeros(64, 3, 11, 11)}, folder/'alexnet.safetensors')
    return folder


@pytest.fixture
def here(material, tmp_path, monkeypatch):
    "A copy of it, in which the commands run; every run finds the sample where it looks for CIFAR-10."
    folder = tmp_path/'here'
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def on_sample(monkeypatch):
    "CIFAR-10 is the sample."
    for module in ('data', 'preparation'): monkeypatch.setattr(f'resnet_cifar.{module}.load_cifar10', lambda root, skip_checksum=False: sample_cifar10())


def run(capsys, words):
    "Exit code, stdout, stderr."
    code = main(words.split() if isinstance(words, str) else words)
    return code, *capsys.readouterr()


@pytest.mark.parametrize('words, code, problem', [(words, 2, problem) for words, problem in WRONG] + BAD, ids=str)
def test_bad_command(here, capsys, on_sample, request, words, code, problem):
    if 'root' in words or words.startswith('download'): request.getfixturevalue('monkeypatch').undo() # the real function looks
    os.chdir(here)
    before = {path.name for path in here.iterdir()}
    found, _, err = run(capsys, words)
    assert (found, err.count('\n'), err[:7])==(code, 1, 'error: '), err
    assert problem in err
    left = [path for path in here.rglob('*') if path.is_file() and path.name not in before]
    assert left==[] and {path.name for path in here.iterdir()} - before <= {'data'}


@pytest.mark.parametrize('name', [name for name in COMMANDS if name!='train'])
def test_help_describes_every_flag(capsys, name):
    with pytest.raises(SystemExit) as end: main([name, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    comments = comments_of(COMMANDS[name][1])
    assert end.value.code==0 and text.startswith(f'usage: resnet-cifar {name}')
    assert set(comments)=={field.name for field in dataclasses.fields(COMMANDS[name][1])}
    for flag, comment in comments.items(): assert ' '.join(comment.split()) in text and (f'--{flag}' in text or flag in ('images', 'name', 'runs')), flag


def test_help_of_train_and_of_all(capsys):
    with pytest.raises(SystemExit): main(['train', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for spec in (TrainConfig, RunFlags):
        for flag, comment in comments_of(spec).items(): assert f'--{flag}' in text and comment in text, flag
    for words in ('--help', '-h', 'help', ''):
        code, out, _ = run(capsys, words)
        assert code==0 and all(f'  {name} ' in out for name in COMMANDS)
    assert run(capsys, '--version')==run(capsys, '-V')==(0, f'{importlib.import_module("resnet_cifar").__version__}\n', '')


def test_a_terminal_and_a_pipe_read_the_same(material):
    "Programs that look whether they write to a terminal may colour or box what they print."
    for words in ('train --batchsize 3', 'evaluate', 'train --lr nan', 'trian'):
        command = [sys.executable, '-m', 'resnet_cifar', *words.split()]
        piped = subprocess.run(command, cwd=material, capture_output=True, text=True)
        ours, theirs = pty.openpty()
        code = subprocess.run(command, cwd=material, stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | dict(TERM='xterm-256color', FORCE_COLOR='1')).returncode
        os.close(theirs)
        text = os.read(ours, 10_000).decode()
        os.close(ours)
        assert (code, text.replace('\r\n', '\n'))==(piped.returncode, piped.stderr)==(2, piped.stderr) and piped.stderr.count('\n')==1 and piped.stdout==''


def test_no_pytorch_before_it_is_needed(material):
    "Nor matplotlib, nor the tools the book is written with: importing, help, wrong words."
    lines = [words for words, _ in WRONG] + ['--help', '--version'] + [f'{name} --help' for name in COMMANDS]
    program = f'''
import sys
import resnet_cifar
from resnet_cifar.cli import main
for words in {lines!r}:
    try: main(words.split())
    except SystemExit as end: assert end.code==0
    loaded = {{"torch", "matplotlib", "fastcore", "nbdev", "IPython"}} & set(sys.modules)
    assert not loaded, (words, loaded)
print("none")
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=material, capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.endswith('none\n'), done.stderr


def test_train_prints_its_first_line_before_pytorch(material):
    program = 'import sys; sys.modules["torch"] = None; from resnet_cifar.cli import main; sys.exit(main(["train", "--model_name", "ResNet10"]))'
    done = subprocess.run([sys.executable, '-c', program], cwd=material, capture_output=True, text=True)
    assert (done.returncode, done.stdout)==(2, 'training resnet10; loading PyTorch\n') and done.stderr.startswith('error: ') and done.stderr.count('\n')==1
    done = subprocess.run([sys.executable, '-c', program], cwd=material, capture_output=True, text=True, env=os.environ | dict(RANK='1', TORCHELASTIC_RUN_ID='x'))
    assert done.stdout=='' # of several processes the first one speaks


def test_programs(material):
    "The three names of the command."
    for command, words in ((['-m', 'resnet_cifar', 'train'], ''), (['-m', 'resnet_cifar.trainer'], ''),
        ([str(Path(sys.executable).parent/'resnet-cifar'), 'train'], None)):
        program = [] if words is None else [sys.executable]
        done = subprocess.run([*program, *command, '--momentum', '2'], cwd=material, capture_output=True, text=True)
        assert (done.returncode, done.stderr)==(2, 'error: --momentum 2.0: must be from 0 to 1\n')


def test_trainer_main_is_the_command_train(capsys):
    assert trainer.main(['--momentum', '2'])==2 and capsys.readouterr().err=='error: --momentum 2.0: must be from 0 to 1\n'


def test_debug_brings_the_traceback_back(here, capsys):
    code, _, err = run(capsys, 'download --archive nowhere.tar.gz --debug')
    assert code==2 and 'Traceback' in err and err.splitlines()[-1].startswith('error: ')


def test_train_evaluate_report_and_predict(here, capsys, on_sample):
    "From settings to a page of evidence; `train` and `evaluate` print the same accuracy."
    train = 'train --ckpt_dir run --model_name resnet10 --width 8 --num_epochs 1 --limit_train 100 --valid_size 100 --batch_size 50'
    train += ' --num_workers 0 --precision fp32 --limit_test 60'
    code, out, err = run(capsys, train)
    assert (code, err)==(0, '') and out.startswith('training resnet10; loading PyTorch\n') and 'evaluate --ckpt run' in out
    accuracy = next(line for line in out.splitlines() if line.startswith('test accuracy')).split()[2]
    code, out, err = run(capsys, 'evaluate --ckpt run --precision fp32 --limit_test 60 --tta --report page')
    lines = out.splitlines()
    assert (code, err)==(0, '') and lines[0].startswith(f'test accuracy {accuracy}, loss ') and lines[0].endswith('(60 images, fp32)')
    assert lines[1].startswith('with mirror images averaged 0.') and lines[2].startswith('with six views averaged 0.')
    assert [line.split()[0] for line in lines[3:14]]==['class',
        *CLASSES] and lines[-1]=='report        page/report.html'
    metrics = json.loads((here/'page'/'metrics.json').read_text())
    assert f"{metrics['accuracy']:.4f}"==accuracy and 'run on 60 test images' in metrics['about']
    assert metrics['temperature'] is not None # fitted on what the run set aside
    code, _, err = run(capsys, train)
    assert code==2 and err.startswith('error: --ckpt_dir run holds a run: ') and '--overwrite' in err


def test_predict(here, capsys):
    sample = sample_cifar10()
    for name, index in (('first', 0), ('second', 1)): Image.fromarray(sample.test_images[index].permute(1, 2, 0).numpy()).save(here/f'{name}.png')
    names = [CLASSES[sample.test_labels[index]] for index in (0, 1)]
    code, out, err = run(capsys, 'predict first.png second.png --precision fp32 --top_k 2')
    lines = out.splitlines()
    assert (code, err, [lines[i].split()[0] for i in (0, 1, 3, 4)], len(lines))==(0, '', ['first.png', names[0], 'second.png', names[1]], 6)
    code, out, err = run(capsys, 'predict first.png a_file second.png --json --explain seen --precision fp32')
    answers = [json.loads(line) for line in out.splitlines()]
    assert (code, err.count('\n'), [answer['file'] for answer in answers])==(1, 1, ['first.png', 'a_file', 'second.png'])
    assert answers[0]['class']==names[0] and 'error' in answers[1] and len(list((here/'seen').iterdir()))==2


def test_export_and_back(here, capsys, monkeypatch):
    "Both formats as a user would write them; an exported file can be exported again."
    def export_onnx(model, path, **options): # the real one is tested with the weights
        Path(path).write_text(json.dumps(options))
        return 2.5e-7
    monkeypatch.setattr('resnet_cifar.weights.export_onnx', export_onnx)
    code, out, err = run(capsys, 'export --ckpt hundred.safetensors --format onnx --output thin.onnx --softmax')
    assert (code, err)==(0, '') and out=='ONNX Runtime differs by at most 2e-07 of the largest output\nthin.onnx: resnet20 with 100 classes, width 4, 0.0 MB\n'
    assert json.loads((here/'thin.onnx').read_text())==dict(normalize=False, softmax=True)
    code, out, err = run(capsys, 'export --ckpt hundred.safetensors')
    assert (code, err)==(0, '') and out.startswith('model.safetensors: resnet20 with 100 classes, width 4, 0.1 MB')
    assert (here/'model.safetensors').read_bytes()==(here/'hundred.safetensors').read_bytes()
    assert run(capsys, 'export --ckpt DEFAULT')[0]==2 and run(capsys, 'export --ckpt DEFAULT --overwrite')[0]==0
    assert (here/'model.safetensors').read_bytes()!=(here/'hundred.safetensors').read_bytes()


def test_onnx_without_the_extra(here, capsys, monkeypatch):
    "One line says what to install, and nothing is left behind."
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name.startswith('onnx') else find(name, *rest))
    code, _, err = run(capsys, 'export --ckpt hundred.safetensors --format onnx')
    assert code==2 and err.startswith('error: ONNX needs onnx') and err.endswith("pip install 'resnet_cifar[export]'\n") and not (here/'model.onnx').exists()


def test_info(capsys, monkeypatch):
    code, out, _ = run(capsys, 'info ResNet18')
    assert (code, out.splitlines()[-1].split())==(0, ['total', '10', '11,173,962', '555.4', '4.70'])
    monkeypatch.setattr('resnet_cifar.cli.MODELS', ('resnet20', 'plain20')) # all of them take half a minute
    code, out, _ = run(capsys, 'info')
    assert (code, [line.split()[0] for line in out.splitlines()])==(0, ['name', 'resnet20', 'plain20'])


def test_info_lists_runs(here, capsys):
    "The others are listed when one cannot be read, and the exit code says so."
    source = next(path for path in sorted((ROOT/'nbs'/'runs').glob('part-all-*.json')))
    (here/'runs').mkdir()
    shutil.copy(source, here/'runs')
    code, out, err = run(capsys, 'info --runs runs')
    assert (code, err, len(out.splitlines()))==(0, '',
        2) and out.startswith(f'{source.stem}: test accuracy 0.') and f'--ckpt_dir checkpoints/{source.stem}' in out
    (here/'runs'/'bad.json').write_text('{"history": 3}')
    again = run(capsys, 'info --runs runs')
    assert again[:2]==(1, out) and again[2]=='error: runs/bad.json: is no record of a run\n'


def test_bench_prints_and_writes(here, capsys, monkeypatch, on_sample):
    result = json.loads((ROOT/'nbs'/'runs'/'bench-resnet18.json').read_text())
    asked = {}
    monkeypatch.setattr('resnet_cifar.bench.bench', lambda name, batch_size, **options: asked.update(options, name=name, batch_size=batch_size) or result)
    monkeypatch.setattr('resnet_cifar.bench.bench_lines', lambda result: [f'ratio {result["step_ratio"]:.2f}'])
    code, out, err = run(capsys, 'bench --batch_size 64 --no_compile --json numbers.json --precision fp32')
    assert (code, err)==(0, '') and out.splitlines()[1:]==[f'ratio {result["step_ratio"]:.2f}']
    assert json.loads((here/'numbers.json').read_text())==result
    assert {name: asked[name] for name in ('name', 'batch_size', 'compile', 'precision', 'device')}==\
        dict(name='resnet18', batch_size=64, compile=False, precision='fp32', device=pick_device('auto').type)


def test_record_passes_on_what_it_is_given(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr('resnet_cifar.records.write_record', lambda folder,
        **options: asked.append((folder, options)) or Path(f'/somewhere/nbs/runs/{folder}.json'))
    assert run(capsys, 'record a b --overwrite')==(0, 'a: recorded as a.json\nb: recorded as b.json\n', '')
    assert run(capsys, 'record a --name c')[0]==0
    assert asked==[('a', dict(overwrite=True, name=None)), ('b', dict(overwrite=True, name=None)), ('a', dict(overwrite=False, name='c'))]
