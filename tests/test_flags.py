"A command line from a dataclass, and what goes wrong in one line."
import dataclasses
import os
import signal
import subprocess
import sys
import threading

import pytest

from resnet_cifar.flags import comments_of, did_you_mean, exit_code, one_line_errors, parse_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    "Shared by some."
    device:str='auto' # where,
    # on this machine
    seed:int|None=None # of all draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Common):
    "An example, 100% made up."
    path:str # a file; "#" is not special here
    words:tuple[str, ...]=dataclasses.field(default=(), metadata=dict(positional='*')) # any
    fast:bool=True # skip 50% of the work
    sizes:tuple[int, ...]=() # of images
    rate:float=0.5 # of learning


def parse(*words): return parse_flags([Example], list(words), prog='example')


def test_only_what_is_given_comes_back():
    assert parse('--path', 'x')==dict(path='x')
    assert parse('--path=x', '--no_fast', '--sizes', '1', '2', '--rate', '1e-3', '--seed', '7')==dict(path='x', fast=False, sizes=(1, 2), rate=0.001, seed=7)
    assert parse('a', '--path', 'x', 'b', '--sizes', '--debug')==dict(path='x', words=('a', 'b'), sizes=())
    assert parse('--path', 'a-b', '--', 'no-flag')==dict(path='a-b', words=('no-flag',))
    assert parse('--path', 'x', '--no_fast', '--fast')==dict(path='x', fast=True) # the later one


@pytest.mark.parametrize('words, problem', [
    ([], 'the following arguments are required: --path'), (['--path'], '--path: expected one argument'),
    (['--path', 'x', '--rates', '1'], 'did you mean --rate?'),
    (['--path', 'x', '--rat', '1'], '--rat: no such flag'), (['--path', 'x', '--seed', 'one'], "--seed: invalid int value: 'one'"),
    (['--path', 'x', '-z'], '-z: no such flag')])
def test_errors(words, problem):
    with pytest.raises(ValueError) as error: parse(*words)
    assert problem in str(error.value) and str(error.value).endswith('`example --help` lists all flags')


def test_help_has_every_flag_and_its_comment(capsys):
    with pytest.raises(SystemExit) as end: parse('--help')
    text = ' '.join(capsys.readouterr().out.split())
    assert end.value.code==0 and text.startswith('usage: example') and 'An example, 100% made up.' in text and '--debug' in text
    for name, comment in comments_of(Example).items(): assert comment in text and (name=='words' or f'--{name}' in text)
    assert comments_of(Example)==dict(device='where, on this machine', seed='of all draws', path='a file; "#" is not special here', words='any',
                                      fast='skip 50% of the work', sizes='of images', rate='of learning')
    assert '(default: 0.5)' in text and '(default: True)' in text


def test_a_hint_only_when_something_is_near():
    assert did_you_mean('--lrn', ['--lr', '--root'])=='did you mean --lr? ' and did_you_mean('quick', ['speedrun', 'resnet18'])==''


def test_exit_codes():
    class Stopped(KeyboardInterrupt): code = 143
    codes = {ValueError: 2, UnicodeDecodeError: 2, FileNotFoundError: 2, FileExistsError: 2, NotADirectoryError: 2, IsADirectoryError: 2,
        PermissionError: 2, ImportError: 2,
             ModuleNotFoundError: 2, OSError: 1, ConnectionError: 1, TimeoutError: 1, RuntimeError: 1, FloatingPointError: 1, MemoryError: 1, KeyError: 1,
                 KeyboardInterrupt: 130, Stopped: 143}
    assert {kind: exit_code(kind.__new__(kind)) for kind in codes}==codes


def test_what_is_printed(capsys):
    def failing(error):
        def command(argv): raise error
        return one_line_errors(command)
    for error, code, line in ((ValueError('--lr 0:\n  too small'), 2, 'error: --lr 0: too small'),
        (OSError(28, 'No space left'), 1, 'error: [Errno 28] No space left'),
                              (RuntimeError('no\nmemory'), 1, 'error: RuntimeError: no memory'), (ValueError(), 2, 'error: ValueError'),
                              (KeyboardInterrupt(), 130, 'stopped'),
                              (KeyboardInterrupt('stopped after 3 epochs'), 130, 'stopped after 3 epochs')):
        assert failing(error)([])==code
        assert capsys.readouterr()==('', f'{line}\n')
    assert failing(RuntimeError('x'))(['--debug'])==1 and 'Traceback' in capsys.readouterr().err
    assert one_line_errors(lambda argv: None)([])==0 and one_line_errors(lambda argv: 3)([])==3


def test_in_a_thread():
    "Where no signal can be caught."
    codes = []
    thread = threading.Thread(target=lambda: codes.append(one_line_errors(lambda argv: len(argv))(['a', 'b'])))
    thread.start()
    thread.join()
    assert codes==[2]


def test_the_signal_handler_is_as_before():
    before = signal.getsignal(signal.SIGTERM)
    one_line_errors(lambda argv: 0)([])
    assert signal.getsignal(signal.SIGTERM)==before


PROGRAM = '''
import sys, time
from resnet_cifar.flags import one_line_errors
@one_line_errors
def main(argv):
    print('started', flush=True)
    while True:
        time.sleep(0.01)
        if argv: print('more', flush=True)
sys.exit(main())
'''


@pytest.mark.skipif(os.name=='nt', reason='Windows has other signals')
@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command(number, code):
    program = subprocess.Popen([sys.executable, '-c', PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline()=='started\n'
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, err)==(code, 'stopped\n')


def test_a_reader_who_has_had_enough():
    "As in `resnet-cifar info | head -1`: no traceback."
    program = subprocess.Popen([sys.executable, '-c', PROGRAM, 'talk'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.readline()
    program.stdout.close()
    assert (program.wait(timeout=60), program.stderr.read())==(1, '')
    program.stderr.close()
