"Faults that were mended on the spot, each with the test that would have told."
import os
import pty
import subprocess
import sys

import pytest

PROGRAM = [sys.executable, '-m', 'resnet_cifar']


def in_a_terminal(*words):
    "(exit code, what the user reads) of the command in a terminal of its own."
    here, there = pty.openpty()
    environment = os.environ | dict(TERM='xterm-256color')
    process = subprocess.Popen([*PROGRAM, *words], stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    said = b''
    try:
        while piece := os.read(here, 4096): said += piece
    except OSError: pass # nobody has the other side any more
    os.close(here)
    return process.wait(), said.decode().replace('\r\n', '\n')


@pytest.mark.parametrize('words, named', [
    (('train', '--batchsize', '3'), '--batchsize'),
    (('train', '--batch_size', 'many'), '--batch_size'),
    (('train', '--precision', 'fp16'), '--precision'),
    (('train', '--lr'), '--lr'),
    (('export',), '--ckpt'),
    (('info', '--run'), '--run'),
], ids=lambda v: ' '.join(v) if isinstance(v, tuple) else None)
def test_a_usage_error_reads_the_same_in_a_terminal_and_in_a_pipe(words, named):
    "One line that names the flag: colours are for eyes, not for what reads the message."
    piped = subprocess.run([*PROGRAM, *words], capture_output=True, text=True)
    assert (piped.returncode, piped.stdout, piped.stderr.count('\n'))==(2, '', 1), piped
    assert piped.stderr.startswith('error: ') and named in piped.stderr
    assert in_a_terminal(*words)==(2, piped.stderr)
