"Makes the site `_docs/` from the notebooks: nbdev processes them, smalldocs renders them, nothing is loaded from elsewhere."
import configparser
import json
import os
import re
import shutil
import sys
from pathlib import Path

if sys.version_info < (3, 11): sys.exit('error: smalldocs, which renders the site, needs Python 3.11 or newer')

import yaml

ROOT = Path(__file__).parent.parent
PROC, OUT = ROOT/'_proc', ROOT/'_docs'


def page_name(name:str)->str:
    "nbdev's links to names of the package say `blocks.html`, so `02_blocks` becomes `blocks`."
    return re.sub(r'\b\d\d_(\w+\.(ipynb|html))', r'\1', name)


def links(text:str)->str: return re.sub(r'\]\([^)\s]+\)', lambda link: page_name(link[0]), text)


def rename(folder:Path)->None:
    "Rename the processed chapters, in links too; each keeps the time of its source, which is that of its page."
    for path in sorted(folder.glob('**/*.ipynb')):
        notebook = json.loads(path.read_text(encoding='utf-8'))
        for cell in notebook['cells']:
            if cell['cell_type']!='code': cell['source'] = links(re.sub(r'^output-file: .*\n', '', ''.join(cell['source']), flags=re.M))
            for output in cell.get('outputs', []):
                if 'text/markdown' in output.get('data', {}): output['data']['text/markdown'] = links(''.join(output['data']['text/markdown']))
        new, seconds = path.with_name(page_name(path.name)), (ROOT/'nbs'/path.relative_to(folder)).stat().st_mtime
        path.unlink()
        new.write_text(json.dumps(notebook), encoding='utf-8')
        os.utime(new, (seconds, seconds))


def settings(folder:Path)->str:
    "Write the site's settings, with what only this build needs: the API's pages, and the address where settings.ini names one; the path below which the site stands."
    given = configparser.ConfigParser(interpolation=None, delimiters=['='])
    given.read(ROOT/'settings.ini', encoding='utf-8')
    host, base, git, branch = (given['DEFAULT'][name] for name in ('doc_host', 'doc_baseurl', 'git_url', 'branch'))
    config = yaml.safe_load(page_name((ROOT/'_quarto.yml').read_text(encoding='utf-8')))
    config['project']['output-dir'] = '_docs'
    del config['execute'] # smalldocs runs nothing
    if host: config['website']['site-url'] = host.rstrip('/') + base
    chapters = sorted((ROOT/'nbs').glob('*/[0-9]*.ipynb'), key=lambda path: path.name)
    modules = [page_name(path.name).removesuffix('.ipynb') for path in chapters]
    modules = [name for name in modules if (ROOT/'resnet_cifar'/f'{name}.py').exists()] # some chapters export nothing
    config['website']['sidebar']['contents'].append(dict(section='API', contents=[f'api/{name}.md' for name in modules]))
    config['smalldocs'] = dict(api=dict(packages=['resnet_cifar'], out='api', root=str(ROOT), **(dict(source=f'{git}/blob/{branch}') if git else {})))
    (folder/'_quarto.yml').write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding='utf-8')
    return base


def keep_local(folder:Path, base:str)->None:
    "KaTeX from the site itself, fonts from the reader's system; where a page would load anything from another host all the same, that is an error."
    from smalldocs.layout import KATEX # the address on another host that pages would load it from
    shutil.copytree(ROOT/'nbs'/'katex', folder/'site_libs'/'katex')
    for path in folder.glob('**/*.css'):
        path.write_text(re.sub(r'@import\s*url\([^)]*\);?', '', path.read_text(encoding='utf-8')), encoding='utf-8')
    for path in folder.glob('**/*.html'):
        text, up = path.read_text(encoding='utf-8'), '../'*(len(path.relative_to(folder).parts) - 1)
        text = text.replace(f'{KATEX}/contrib/', f'{up}site_libs/katex/').replace(KATEX, f'{up}site_libs/katex')
        text = re.sub(r'<pre\b(?![^>]*tabindex)', '<pre tabindex="0"', text) # what scrolls sideways can be scrolled with the keyboard
        if path.name=='404.html': text = text.replace('<head>', f'<head><base href="{base}">', 1) # shown in place of pages in any folder
        if load := re.search(r'<(?:script|img|iframe)[^>]*\bsrc="https?:[^"]*"|<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="https?:[^"]*"', text): sys.exit(f'error: {path.name} would load {load[0]}')
        path.write_text(text, encoding='utf-8')


def build()->None:
    from nbdev.serve import proc_nbs
    from smalldocs.site import build as render
    for folder in (PROC, OUT): shutil.rmtree(folder, ignore_errors=True)
    os.environ['PYTHONWARNINGS'] = 'ignore:Found cells containing imports' # a function in an exercise imports something
    proc_nbs(n_workers=2)
    for name in ('favicon.svg', '404.md', 'site.css'): shutil.copy2(ROOT/'nbs'/name, PROC/name)
    rename(PROC)
    base = settings(PROC)
    site = render(PROC, quiet=True)
    if site.warnings: sys.exit('\n'.join(map(str, site.warnings)))
    shutil.move(PROC/'_docs', OUT)
    keep_local(OUT, base)
    print(f'{sum(1 for _ in OUT.glob("**/*.html"))} pages in {OUT.name}')


if __name__=='__main__':
    os.chdir(ROOT)
    build()
