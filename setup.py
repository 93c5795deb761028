"Reads everything from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(interpolation=None, delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
export = cfg['export_requirements'].split()
tensorboard = cfg['tensorboard_requirements'].split()
dev = export + tensorboard + cfg['dev_requirements'].split()

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown', author=cfg['author'],
    license='Apache-2.0', license_files=['LICENSE'], keywords=cfg['keywords'].split(),
    url=cfg['git_url'] or None, python_requires=f">={cfg['min_python']}",
    packages=['resnet_cifar'],
    package_data={'resnet_cifar': ['py.typed', 'sample/*.png', 'weights/*', 'templates/*.html']},
    install_requires=cfg['requirements'].split(),
    extras_require=dict(export=export, tensorboard=tensorboard, dev=dev, all=dev),
    entry_points={'console_scripts': cfg['console_scripts'].split('\n')}, zip_safe=False,
    classifiers=[
        'Intended Audience :: Developers', 'Intended Audience :: Education',
        'Operating System :: OS Independent', 'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
