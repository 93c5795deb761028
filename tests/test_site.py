"The site as it comes out: links, pictures, what it loads, and how it behaves in a browser."
import functools
import hashlib
import http.server
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import CHROMIUM, CHROMIUM_FLAGS, ROOT

CHAPTERS = [f'{path.parent.name}/{path.stem[3:]}' for path in sorted((ROOT/'nbs').glob('*/[0-9]*.ipynb'))]
MODULES = [path.stem for path in (ROOT/'resnet_cifar').glob('*.py') if not path.stem.startswith('_')]
PAGES = ('index.html', 'learn/blocks.html', 'learn/interpret.html', 'api/models.html', 'build/checkpoint.html') # of each kind one


def build():
    done = subprocess.run([sys.executable, ROOT/'tests'/'build_site.py'], capture_output=True, text=True)
    assert (done.returncode, done.stderr)==(0, ''), done.stdout + done.stderr
    return ROOT/'_docs'


def digests(folder): return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob('**/*') if path.is_file()}


@pytest.fixture(scope='module')
def site(): return build()


class Page(HTMLParser):
    "What a page links to, loads and shows."
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.images, self.text, self.inside = set(), [], [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in (('id', 'name') if tag=='a' else ('id',)) if values.get(name)}
        if tag=='a' and 'href' in values: self.links.append(values['href'])
        if tag=='link' and values.get('rel') not in ('canonical', 'alternate'): self.loads.append(values.get('href', ''))
        if 'src' in values: self.loads.append(values['src'])
        if tag=='img': self.images.append(values)
        if tag in ('pre', 'code', 'script', 'style', 'textarea'): self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag==self.inside[-1]: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.text.append(data)


@pytest.fixture(scope='module')
def pages(site): return {path.relative_to(site).as_posix(): Page(path) for path in site.glob('**/*.html')}


def test_every_chapter_and_module_has_a_page(pages):
    assert set(pages)=={'index.html', '404.html', 'references.html'} | {f'{name}.html' for name in CHAPTERS} | {f'api/{name}.html' for name in MODULES}


def test_links_and_anchors_lead_somewhere(site, pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (site/name).parent/unquote(parts.path) if parts.path else site/name
            target = target.resolve().relative_to(site.resolve()).as_posix()
            assert (site/target).is_file(), f'{name}: {link}'
            if parts.fragment and target in pages: assert unquote(parts.fragment) in pages[target].anchors, f'{name}: {link}'


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items(): assert [load for load in page.loads if urlsplit(load).netloc]==[], name
    for path in site.glob('**/*.css'): assert not re.search(r'@import|url\(["\']?(https?:)?//', path.read_text(encoding='utf-8')), path.name


def test_pictures_have_alt_texts(pages):
    assert sum(len(page.images) for page in pages.values()) >= 10
    for name, page in pages.items(): assert [image.get('src') for image in page.images if not image.get('alt')]==[], name


def test_no_markup_is_left_over(pages):
    for name, page in pages.items():
        found = re.search(r'^:::|\{#\w|\{\.\w|@fig-|\[@|\]\(\S|^#\||\*\*\w|^\s*#{2,} \w|> \[!', ''.join(page.text), re.M)
        assert not found, f'{name}: {"".join(page.text)[max(0, found.start() - 40):found.end() + 40]!r}'


def test_llms_txt_lists_the_pages(site):
    listed = re.findall(r'\]\(([^)]+)\)', (site/'llms.txt').read_text(encoding='utf-8'))
    assert {f'{name}.llms.md' for name in ['index', *CHAPTERS]} <= set(listed)
    for name in listed: assert (site/name).is_file(), name


def test_the_same_files_come_out_again(site):
    first = digests(site)
    assert digests(build())==first


def test_a_site_with_an_address(site, tmp_path):
    "The sitemap and the links to sources need one: here with one chapter, so that it is quick."
    copy = tmp_path/'copy'
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns('.venv', '.git', 'data', 'checkpoints', '_docs', '_proc', '*.egg-info', '__pycache__', '[0-9]*.ipynb'))
    shutil.copy2(ROOT/'nbs'/'learn'/'02_blocks.ipynb', copy/'nbs'/'learn')
    settings = (copy/'settings.ini').read_text()
    (copy/'settings.ini').write_text(settings.replace('git_url =', 'git_url = https://code.example/resnet_cifar').replace('doc_host =', 'doc_host = https://docs.example'))
    quarto = yaml.safe_load((copy/'_quarto.yml').read_text())
    quarto['website']['sidebar']['contents'] = ['index.ipynb', 'learn/02_blocks.ipynb']
    (copy/'_quarto.yml').write_text(yaml.safe_dump(quarto))
    for path in (copy/'nbs').glob('**/*.ipynb'): # links to pages that are not in the copy
        here = '02_blocks.ipynb' if path.parent.name=='learn' else 'learn/02_blocks.ipynb'
        path.write_text(re.sub(r'\]\((\.\./)?((learn|build)/)?\d\d_[^)]*\)', f']({here})', path.read_text()))
    done = subprocess.run([sys.executable, copy/'tests'/'build_site.py'], capture_output=True, text=True)
    assert done.returncode==0, done.stdout + done.stderr
    assert 'https://docs.example/learn/blocks.html' in (copy/'_docs'/'sitemap.xml').read_text()
    assert 'https://code.example/resnet_cifar/blob/main/resnet_cifar/blocks.py#L' in (copy/'_docs'/'api'/'blocks.html').read_text()


@pytest.fixture(scope='module')
def browser(site):
    "Chromium, the site's address, and the addresses of other hosts that pages asked for."
    from playwright.sync_api import sync_playwright
    if CHROMIUM is None: pytest.skip('no Chromium here')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium, f'http://127.0.0.1:{server.server_port}'
        chromium.close()
    server.shutdown()


@pytest.fixture
def show(browser):
    "Open a page: nothing may fail, and nothing may be asked from another host."
    chromium, address = browser
    opened, troubles = [], []

    def show(name, width=1280, scheme='light'):
        page = chromium.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        page.on('request', lambda request: troubles.append(request.url) if not request.url.startswith((address, 'data:', 'blob:')) else None)
        page.on('pageerror', lambda error: troubles.append(str(error)))
        page.on('response', lambda response: troubles.append(f'{response.status} {response.url}') if response.status >= 400 else None)
        page.goto(f'{address}/{name}', wait_until='networkidle')
        opened.append(page)
        return page
    yield show
    for page in opened: page.close()
    assert troubles==[]


def test_search_finds_a_class(show):
    page = show('index.html')
    page.get_by_placeholder('Search').first.fill('BasicBlock')
    hit = page.locator('a[href*="blocks.html"]:visible', has_text='BasicBlock').first
    hit.wait_for()
    hit.click()
    page.wait_for_url('**/blocks.html*')


def test_light_and_dark(show):
    "As the reader's system asks, and by the switch, which is remembered on the next page."
    def paper(page):
        colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert colour.startswith('rgb('), colour # a transparent one has no brightness
        return sum(map(int, re.findall(r'\d+', colour)))
    assert paper(show('index.html')) > 700
    page = show('index.html', scheme='dark')
    assert paper(page) < 150
    page.locator('.quarto-color-scheme-toggle:visible').first.click()
    assert paper(page) > 700
    page.goto(page.url.replace('index', 'learn/blocks'))
    assert paper(page) > 700


def test_the_page_for_wrong_addresses_works_in_any_folder(site):
    assert '<head><base href="/">' in (site/'404.html').read_text(encoding='utf-8') # so that a host may show it in place of /learn/nothing.html


def test_maths_is_drawn(show):
    page = show('learn/blocks.html')
    page.locator('.katex').first.wait_for()
    assert page.evaluate('document.fonts.ready.then(fonts => [...fonts].some(font => font.family.includes("KaTeX_Main") && font.status=="loaded"))')
    assert '\\(' not in page.locator('main').inner_text()


def test_code_can_be_copied(show):
    page = show('index.html')
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    button = page.locator('.code-copy-button').first
    button.locator('xpath=..').hover()
    button.click()
    page.locator('.code-copy-button-checked').first.wait_for()
    assert 'make train' in page.evaluate('navigator.clipboard.readText()')


def test_narrow_screens_do_not_scroll_sideways(show, pages):
    page = show('index.html', width=390)
    base = page.url.removesuffix('index.html')
    for name in pages:
        page.goto(base + name)
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, name


@pytest.mark.parametrize('scheme', ('light', 'dark'))
def test_no_serious_fault_for_readers_with_aids(show, scheme):
    from axe_playwright_python.sync_playwright import Axe
    for name in PAGES:
        found = Axe().run(show(name, scheme=scheme)).response['violations']
        assert [(rule['id'], rule['nodes'][0]['html']) for rule in found if rule['impact'] in ('serious', 'critical')]==[], name
