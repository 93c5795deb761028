"Settings: what is allowed, where they come from, the command that gives them again, what may change on resume."
import dataclasses
import json
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cifar.config import MODELS, RECIPES, RunFlags, TrainConfig, check_settings, command_of, config_from_dict, parse_args, setting
from resnet_cifar.run_folder import changes
from resnet_cifar.flags import comments_of

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
SPECIFICATION = """--root ./data/datasets --batch_size 32 --num_workers 1 --num_epochs 20 --lr 0.001 --optimizer AdamW
    --lr_scheduler CosineAnnealingLR --t_max 10 --model_name ResNet18 --random_seed 0 --ckpt_dir ./checkpoints
    --compile --pin_memory --transform"""


def test_models_are_those_of_the_registry():
    "The list is written twice, so that a misspelt name is answered without loading PyTorch."
    from resnet_cifar.models import list_models
    assert list(MODELS)==list_models()


def test_the_specification():
    config, flags = parse_args(SPECIFICATION.split())
    assert config==TrainConfig(t_max=10, compile=True, pin_memory=True, transform=True)
    assert flags==RunFlags() and TrainConfig().t_max is None
    names = {*FIELDS, *(field.name for field in dataclasses.fields(RunFlags))}
    assert names >= set('''resume overwrite valid_size limit_train limit_test precision channels_last device deterministic recipe config width
        momentum weight_decay label_smoothing ema_decay tta skip_checksum tensorboard'''.split())


@pytest.mark.parametrize('values, problem', [
    (dict(model_name='ResNet19'), '--model_name resnet19: must be one of resnet18, resnet34'),
    (dict(shortcut='D'), '--shortcut D: must be one of auto, A, A2, B, C'),
    (dict(shortcut=None), '--shortcut None: must be of type str'), (dict(optimizer='sgd'), '--optimizer sgd: must be one of SGD, Adam, AdamW, Muon'),
    (dict(num_epochs='30'), '--num_epochs 30: must be of type int'), (dict(num_epochs=True), '--num_epochs True: must be of type int'),
    (dict(num_epochs=2.5), '--num_epochs 2.5: must be of type int'), (dict(lr='0.1'), '--lr 0.1: must be of type float'),
    (dict(compile=1), '--compile 1: must be of type bool'),
    (dict(batch_size=0), '--batch_size 0: must be from 1 to 50000'), (dict(lr=0), '--lr 0: must be from'), (dict(lr=math.nan), '--lr nan'),
    (dict(lr=math.inf), '--lr inf'),
    (dict(momentum=1.1), '--momentum 1.1: must be from 0 to 1'), (dict(ema_decay=1), '--ema_decay 1'), (dict(weight_decay=-1), '--weight_decay -1'),
    (dict(gamma=0), '--gamma 0'),
    (dict(random_seed=-1), '--random_seed -1'), (dict(width=0), '--width 0'), (dict(t_max=0), '--t_max 0'), (dict(crop_padding=17), '--crop_padding 17'),
    (dict(image_sizes=(16, 4)), '--image_sizes 4: must be from 8 to 256'), (dict(image_sizes=[16.5]), '--image_sizes 16.5: must be of type int'),
    (dict(valid_size=5001), '--valid_size 5001: must be a multiple of 10'), (dict(valid_size=50_000), '--valid_size 50000: must be from 0 to 49990'),
    (dict(limit_train=10), '--batch_size 32: --valid_size and --limit_train leave only 10 training images'),
    (dict(valid_size=49_990), 'leave only 10 training images'), (dict(whiten=True, stem='imagenet'), '--whiten: is for small filters'),
    (dict(shortcut='B', model_name='Plain20'), '--shortcut B: plain20 has no shortcuts; leave it out, or take resnet20'),
    (dict(nesterov=False), '--no_nesterov: only SGD has that choice, not --optimizer AdamW')], ids=str)
def test_what_does_not_fit_is_named(values, problem):
    with pytest.raises(ValueError) as error: TrainConfig(**values)
    assert problem in str(error.value) and '\n' not in str(error.value)


def test_the_edges_of_what_fits():
    for values in (dict(limit_train=32), dict(valid_size=0), dict(batch_size=45_000), dict(momentum=0), dict(momentum=1), dict(image_sizes=(8, 256)),
        dict(lr=1), dict(width=None)):
        assert dataclasses.asdict(TrainConfig(**values)).items() >= values.items()
    assert TrainConfig(model_name='ResNet110').model_name=='resnet110' and TrainConfig(image_sizes=[16, 32]).image_sizes==(16, 32)


def test_every_setting_says_what_is_allowed_and_what_resuming_makes_of_it():
    comments = comments_of(TrainConfig)
    for name, field in FIELDS.items():
        kind = (typing.get_args(field.type) or [field.type])[0]
        assert field.metadata['resume'] in ('place', 'free', 'noted', 'between epochs', 'fixed'), name
        assert kind not in (int, float) or 'limits' in field.metadata, name
        assert len(comments[name]) > 10, name


def test_recipe_then_file_then_flag(tmp_path):
    file = tmp_path/'mine.toml'
    file.write_text('lr = 0.05\nnum_epochs = 7\nimage_sizes = [16, 32]\n')
    config, flags = parse_args(['--num_epochs', '8', '--config', str(file), '--recipe=speedrun', '--no_transform', '--resume', 'auto'])
    assert config==dataclasses.replace(RECIPES['speedrun'], lr=0.05, image_sizes=(16, 32), num_epochs=8, transform=False)
    assert flags==RunFlags(recipe='speedrun', config=str(file), resume='auto')
    for text, problem in (('lr = "fast"', '--lr fast: must be of type float'), ('lr == 3', 'not a TOML file'),
        ('lrn = 3', 'lrn is no setting; did you mean lr?'),
                          ('zzz = 3', 'zzz is no setting'), ('image_sizes = "s"', '--image_sizes s: must be of type int'), ('[train]\nlr = 1', '[train] is a table'), ('recipe = "quik"', 'recipe quik: must be one of'), ('batch_size = 0', '--batch_size 0: must be from 1')):
        file.write_text(text)
        with pytest.raises(ValueError) as error: parse_args(['--config', str(file)])
        assert 'mine.toml' in str(error.value) and problem in str(error.value) and '\n' not in str(error.value)
    for path in (tmp_path/'nowhere.toml', tmp_path):
        with pytest.raises(ValueError, match='not a TOML file'): parse_args(['--config', str(path)])


@pytest.mark.parametrize('words, problem', [
    (['--batchsize', '3'], '--batchsize: no such flag; did you mean --batch_size?'),
    (['--no_such_flag'], '--no_such_flag: no such flag; `resnet-cifar train --help`'),
    (['--transfor'], '--transfor: no such flag; did you mean --transform?'), (['stray'], 'stray: no such flag'), (['--lr'], '--lr: expected one argument'),
    (['--lr', 'fast'], "--lr: invalid float value: 'fast'"), (['--num_epochs', '2.5'], '--num_epochs'), (['--lr', '-1'], '--lr -1.0: must be from'),
    (['--recipe', 'quick'], '--recipe quick: must be one of speedrun, resnet18'), (['--transform=yes'], '--transform'),
    (['--image_sizes', '16', 'big'], '--image_sizes')])
def test_a_wrong_command_line_is_one_line(words, problem):
    with pytest.raises(ValueError) as error: parse_args(words)
    assert problem in str(error.value) and '\n' not in str(error.value)


def test_spellings():
    for words in (['--batch_size', '64'], ['--batch-size', '64'], ['--batch-size=64'], ['--batch_size=8', '--batch-size', '64']):
        assert parse_args(words)[0]==TrainConfig(batch_size=64)
    assert parse_args(['--root', 'a-b/c-d', '--ckpt-dir=e-f'])[0]==TrainConfig(root='a-b/c-d', ckpt_dir='e-f')
    assert parse_args(['--no-channels-last'])[0]==parse_args(['--no_channels_last'])[0]==TrainConfig(channels_last=False)
    assert parse_args(['--recipe', 'speedrun', '--image_sizes'])[0].image_sizes==()
    assert parse_args(['--image_sizes', '16', '24', '--lr', '1e-2'])[0]==TrainConfig(image_sizes=(16, 24), lr=0.01)


def values_of(field):
    "Any value that a field allows, of a moderate size."
    kind, limits = (typing.get_args(field.type) or [field.type])[0], field.metadata.get('limits')
    if kind is bool: return st.booleans()
    if 'allowed' in field.metadata: return st.sampled_from(field.metadata['allowed'])
    if kind is str: return st.just(field.default)
    one = st.integers(limits[0], min(limits[1], 400)) if kind is int else st.floats(*limits)
    if typing.get_origin(field.type) is tuple: return st.lists(one, max_size=3).map(tuple)
    return st.none() | one if field.default is None else one


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({name: values_of(field) for name, field in FIELDS.items()}))
def test_a_command_gives_its_settings_again(values):
    "Through a command line and through JSON, whatever the settings are."
    try: config = TrainConfig(**values | dict(valid_size=10*(values['valid_size']//10), limit_train=None, nesterov=True))
    except ValueError as error:
        assert '--whiten' in str(error) or 'has no shortcuts' in str(error)
        return
    assert parse_args(command_of(config).split()[2:])[0]==config
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config))), 'a file')==config
    assert changes(config, json.loads(json.dumps(dataclasses.asdict(config))), ignore=())==[]


def test_the_command_of_several_processes():
    config = TrainConfig(lr=0.1, channels_last=False, root='elsewhere', ckpt_dir='there')
    assert command_of(config)=='resnet-cifar train --lr 0.1 --no_channels_last'
    assert command_of(config, world_size=2)=='torchrun --nproc_per_node 2 -m resnet_cifar.trainer --lr 0.1 --no_channels_last'


def test_what_has_changed_since_a_run_began():
    saved = json.loads(json.dumps(dataclasses.asdict(TrainConfig(image_sizes=(16, 32))))) | dict(gone_setting=3)
    assert changes(TrainConfig(image_sizes=(16, 32), root='x', ckpt_dir='y', num_workers=3, pin_memory=True, skip_checksum=True, tta=True, limit_test=5),
        saved)==[]
    found = changes(TrainConfig(image_sizes=(16, 28), lr=0.1, width=8, batch_size=64, label_smoothing=0.1), saved)
    assert {(c.name, c.now, c.then, c.resume, c.schedule) for c in found}=={
        ('image_sizes', (16, 28), (16, 32), 'between epochs', False), ('lr', 0.1, 0.001, 'noted', True), ('width', 8, None, 'fixed', False),
        ('batch_size', 64, 32, 'between epochs', True), ('label_smoothing', 0.1, 0.0, 'noted', False)}
    assert [c.name for c in changes(TrainConfig(tta=True, root='x'), saved | dict(image_sizes=[]), ignore=('place',))]==['tta']
    assert [c.name for c in changes(TrainConfig(gamma=0.5), {})]==['gamma'] # a setting that a file does not know had its default


def test_a_schedule_is_made_of_these():
    assert {name for name, field in FIELDS.items() if field.metadata['schedule']}=={
        'lr', 'momentum', 'weight_decay', 't_max', 'pct_start', 'step_size', 'gamma', 'num_epochs', 'batch_size', 'limit_train', 'bias_lr', 'head_lr'}


def test_checks_of_any_dataclass():
    @dataclasses.dataclass
    class Some:
        count:int|None=setting(None, limits=(1, 9))
        names:tuple[str, ...]=setting((), allowed=('a', 'b'))
    check_settings(Some(9, ('a', 'b', 'a')))
    for bad, problem in ((Some(10), '--count 10: must be from 1 to 9'), (Some(1, ('a', 'c')), '--names c: must be one of a, b'),
        (Some('1'), '--count 1: must be of type int')):
        with pytest.raises(ValueError, match=problem): check_settings(bad)
