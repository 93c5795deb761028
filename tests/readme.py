"Makes README.md from nbs/index.ipynb, without Quarto: prose, code, outputs and figures, links seen from the top folder."
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES = 'nbs/index_files' # pictures that README.md shows, one a cell


def from_top(text:str)->str:
    "Relative links as they are seen from the top folder."
    return re.sub(r'\]\((?!https?:|#|\.\./)([^)]+)\)', r'](nbs/\1)', text).replace('](../', '](')


def figures(notebook:dict)->dict:
    "Cell id -> PNG, as it is stored in the notebook."
    return {cell['id']: base64.b64decode(''.join(output['data']['image/png'])) for cell in notebook['cells'] for output in cell.get('outputs', []) if 'image/png' in output.get('data', {})}


def option(source:str, name:str)->str: return re.search(rf'^#\| {name}: "(.*)"$', source, re.M)[1]


def markdown(notebook:dict)->str:
    parts = []
    for cell in notebook['cells']:
        source = ''.join(cell['source']).strip()
        if cell['cell_type']=='markdown': parts.append(from_top(re.sub(r'\n+- categories: .*$', '', source))) # that is for the site
        elif not re.search(r'^#\|\s*(hide|default_exp)', source, re.M):
            code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|')).strip()
            if not re.search(r'^#\|\s*echo:\s*false', source, re.M): parts.append(f'```python\n{code}\n```')
            for output in cell['outputs']:
                data = output.get('data', {})
                if 'image/png' in data: parts.append(f'![{option(source, "fig-alt")}]({FIGURES}/{cell["id"]}.png)\n\n*{option(source, "fig-cap")}*')
                elif 'text/markdown' in data: parts.append(from_top(''.join(data['text/markdown']).strip()))
                elif 'text' in output or 'text/plain' in data: parts.append('```\n' + ''.join(output.get('text') or data['text/plain']).strip() + '\n```')
    return '<!-- made from nbs/index.ipynb by `make export`: edit there -->\n\n' + '\n\n'.join(parts) + '\n'


if __name__=='__main__':
    notebook = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    (ROOT/'README.md').write_text(markdown(notebook), encoding='utf-8')
    (ROOT/FIGURES).mkdir(exist_ok=True)
    for name, png in figures(notebook).items(): (ROOT/FIGURES/f'{name}.png').write_bytes(png)
