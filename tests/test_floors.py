"""The house has floors, and a floor imports only what is below it; methods import baselines, and each other only where
the catalogue says `builds_on`. Read from the import statements of the modules (grimp), so nothing has to be run."""
import json
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest
from conftest import ROOT

LIB = 'lowrank_distill'
FLOORS = {'core': 0, 'shapes': 1, 'data': 1, 'models': 1, 'analysis': 1, 'explorers': 3, 'reports': 3, 'cli': 3}
BASELINES = {
    'adapters.lora', 'distillation.logits', 'distillation.features', 'distillation.relations',
    'distillation.contrastive', 'dataset_distillation.baselines', 'diffusion.baselines', 'compression.baselines',
    'language.preference', 'vision_language.clip'}
BASELINE, METHOD, TOP = 2, 2.5, 3  # floors 2a and 2b, and the one from which anything may be imported

Graph = Mapping[str, Iterable[str]]  # module -> modules that it imports, both below the package

def floor(module: str, families: set[str]) -> float | None:
    "The floor of a module named below the package (its top is ''); None where the house has no place for it."
    top = module.split('.')[0]
    if not module: return TOP
    if module in BASELINES: return BASELINE
    return FLOORS.get(top, METHOD if top in families else None)

def allowed(importer: str, imported: str, floors: Mapping[str, float], builds_on: Mapping[str, set[str]]) -> bool:
    "May the one module import the other?"
    if floors[imported] < floors[importer]: return True
    if floors[imported] > floors[importer]: return False
    return floors[importer] != METHOD or imported in builds_on.get(importer, ())

def violations(graph: Graph, families: set[str], builds_on: Mapping[str, set[str]]) -> list[str]:
    "Imports that go up or, between methods, sideways without `builds_on`; modules on no floor; cycles of baselines."
    floors = {m: floor(m, families) for m in graph}
    homeless = [f'{m or LIB}: on no floor' for m, f in floors.items() if f is None]
    if homeless: return homeless
    said = [f'{a} (floor {floors[a]}) imports {b or LIB} (floor {floors[b]})' for a in graph for b in sorted(graph[a])
            if not allowed(a, b, floors, builds_on)]
    baselines = {a: [b for b in graph[a] if b in BASELINES] for a in graph if a in BASELINES}
    try: TopologicalSorter(baselines).prepare()
    except CycleError as e: said.append(f'a cycle: {" > ".join(reversed(e.args[1]))}')
    return said

def catalogue() -> tuple[set[str], dict[str, set[str]]]:
    "The families, and for each method's module the modules of the methods that it builds on."
    methods = json.loads((ROOT/LIB/'assets'/'catalog.json').read_text(encoding='utf-8'))['methods']
    module = {m['key']: m['module'] for m in methods}
    return {m['family'] for m in methods}, {m['module']: {module[k] for k in m['builds_on']} for m in methods}

def import_graph() -> dict[str, set[str]]:
    "Our own modules and what they import of each other, wherever in the file the import stands."
    graph = grimp.build_graph(LIB, cache_dir=None)
    short = {m: m.removeprefix(LIB).removeprefix('.') for m in graph.modules}
    return {short[m]: {short[i] for i in graph.find_modules_directly_imported_by(m)} for m in graph.modules
            if not short[m].startswith('_')}  # _modidx: nbdev's index of names

def test_floors():
    graph, (families, builds_on) = import_graph(), catalogue()
    assert 'core.files' in graph and 'core.errors' in graph['core.files']  # the graph is not empty
    assert not violations(graph, families, builds_on)

def test_builds_on_has_no_cycle():
    TopologicalSorter(catalogue()[1]).prepare()


# On a made-up house

FAMILIES, BUILDS_ON = {'adapters', 'distillation', 'optimizers'}, {'optimizers.fira': {'optimizers.galore'}}
HOUSE = {
    '': ['core.catalog', 'adapters.dylora'], 'adapters': [],
    'core.files': ['core.errors'], 'core.errors': [], 'core.catalog': ['core.files'],
    'shapes.adapter': ['core.files', 'shapes.training'], 'shapes.training': ['data.images'],
    'data.images': ['core.errors'],
    'adapters.lora': ['shapes.adapter', 'distillation.logits'], 'distillation.logits': ['core.files'],
    'adapters.dylora': ['adapters.lora', 'distillation.logits', 'shapes.training'],
    'optimizers.galore': ['core.files'], 'optimizers.fira': ['optimizers.galore'],
    'reports.html': ['adapters.dylora', 'core.files'], 'cli': ['reports.html', '']}

def test_a_good_house_passes(): assert violations(HOUSE, FAMILIES, BUILDS_ON) == []

@pytest.mark.parametrize(('importer', 'imported'), [
    ('core.errors', 'shapes.adapter'),         # core imports a shape
    ('data.images', 'adapters.lora'),          # floor 1 imports a baseline
    ('adapters.lora', 'adapters.dylora'),      # a baseline imports a method
    ('adapters.dylora', 'optimizers.galore'),  # a method imports another one that it is not said to build on
    ('optimizers.galore', 'reports.html'),     # a method imports what shows it
    ('optimizers.galore', ''),                 # through the front door, which imports everything
    ('distillation.logits', 'adapters.lora'),  # a cycle of baselines
])
def test_a_wrong_import_is_found(importer, imported):
    broken = HOUSE | {importer: [*HOUSE[importer], imported]}
    assert any(importer in said and (imported or LIB) in said for said in violations(broken, FAMILIES, BUILDS_ON))

def test_a_module_without_a_floor_is_found():
    assert violations(HOUSE | {'helpers': []}, FAMILIES, BUILDS_ON) == ['helpers: on no floor']
