"Gives a cell another id, which JupyterLab cannot: tests/name_cell.py NOTEBOOK OLD NEW, while the notebook is closed; OLD may be the beginning of the id."
import json
import sys
from pathlib import Path

if len(sys.argv)!=4: sys.exit(__doc__)
path, old, new = Path(sys.argv[1]), *sys.argv[2:]
notebook = json.loads(path.read_text(encoding='utf-8'))
ids = [cell['id'] for cell in notebook['cells']]
if new in ids: sys.exit(f'error: {path.name} has a cell {new} already')
found = [cell for cell in notebook['cells'] if cell['id']==old] or [cell for cell in notebook['cells'] if cell['id'].startswith(old)]
if len(found)!=1: sys.exit(f'error: {len(found)} cells of {path.name} have ids that begin with {old}: {", ".join(ids)}')
found[0]['id'] = new
path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
