"Makes README.md from nbs/index.ipynb, without Quarto: prose, code and text outputs, links seen from the top folder."
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def from_top(text:str)->str:
    "Relative links as they are seen from the top folder."
    return re.sub(r'\]\((?!https?:|#|\.\./)([^)]+)\)', r'](nbs/\1)', text).replace('](../', '](')


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
                if 'text/markdown' in data: parts.append(from_top(''.join(data['text/markdown']).strip()))
                elif 'text' in output or 'text/plain' in data: parts.append('```\n' + ''.join(output.get('text') or data['text/plain']).strip() + '\n```')
    return '<!-- made from nbs/index.ipynb by `make export`: edit there -->\n\n' + '\n\n'.join(parts) + '\n'


if __name__=='__main__':
    text = markdown(json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8')))
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    sys.exit(0)
