"""Low-rank adaptation and distillation: methods, evidence, explorers. Public names are imported when they are first used."""
from importlib import import_module
from importlib.metadata import version

_NAMES = dict(adapt='shapes.adapter', advise='shapes.advice', from_peft='shapes.peft', handle_of='shapes.adapter', load_adapter='shapes.adapter', fit='shapes.training',
              Study='core.evidence', Claim='core.evidence', Streams='core.streams', methods='core.catalog', pages='core.catalog',
              show='core.catalog', load='core.catalog', InputError='core.errors', LoRA='adapters.lora', DyLoRA='adapters.dylora')
__all__ = sorted(_NAMES)
__version__ = version('lowrank-distill')


def __getattr__(name: str):
    if name not in _NAMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}; public names: {", ".join(__all__)}')
    return getattr(import_module(f'{__name__}.{_NAMES[name]}'), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
