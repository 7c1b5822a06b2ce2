"""Every adapter that is built keeps every promise of the contract: on random layers, and on networks of others.

`make test` draws 50 layers for each, the same ones every time; `make check` draws 500 new ones.
"""
from functools import partial

import pytest
from hypothesis import settings

from lowrank_distill.adapters.dylora import DyLoRA
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.shapes import conform
from lowrank_distill.shapes.advice import adapter_specs

SPECS = adapter_specs() | {'rslora': lambda r: LoRA(rank=r, rslora=True),
                           'dylora, frozen': lambda r: DyLoRA(frozen=True).at(r), 'dylora, strict': lambda r: DyLoRA(strict_masking=True).at(r)}
suite = partial(conform.adapter, examples=settings.default.max_examples, derandomize=settings.default.derandomize)


@pytest.mark.parametrize('key', SPECS)
def test_promises(key): suite(SPECS[key], others=())


@pytest.mark.parametrize('name', conform.networks())
@pytest.mark.parametrize('key', adapter_specs())
def test_networks_of_others(key, name): conform.network(lambda r: SPECS[key]().at(r), name)
