"""Match the pairs of mini-batches and write their products into an RSM store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsm_probe.errors import ComparisonError, LayerError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames, finished_name
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.products import MatchedProducts
from rsm_probe.probe.representation import Representation
from rsm_probe.stored_products.product_store import ProductStore, StoredBatch
from rsm_probe.stored_products.series import SeriesSet
from rsm_probe.streaming.batch_consumer import Centred, ProductConsumer, Products, naming


@dataclass(frozen=True, eq=False)
class ModelWork:
    """What is to be computed of one model in a mini-batch.

    Attributes:
        layers: layer -> label -> matching, of the layers and matchings that the store lacks.
        keys: layer -> its key in the store.
        wanted: the set of series that these make, in the order of `layers`.
    """

    layers: Mapping[str, Mapping[str, Matching]]
    keys: Mapping[str, str]
    wanted: SeriesSet

    @classmethod
    def of(
        cls,
        layers: Mapping[str, Mapping[str, Matching]],
        keys: Mapping[str, str],
        left_out: Mapping[int, Sequence[int]],
    ) -> ModelWork:
        """The work on these layers and matchings; `left_out` as in `SeriesSet`."""
        methods = [method for one in layers.values() for method in one.values()]
        bounded = frozenset(repr(method) for method in methods if not method.at_once)
        texts = {keys[layer]: [repr(method) for method in one.values()] for layer, one in layers.items()}
        return cls(layers, keys, SeriesSet.of(texts, bounded, left_out))


class Recorder(ProductConsumer):
    """Writes the products of mini-batches into a store, each batch as soon as its pairs are matched.

    Args:
        store: an RSM store whose arrays are declared.
        execution: see `ProductConsumer`.
        means: means to subtract; None does not centre.
        on_pairs: called with a number of pairs each time pairs were matched.
        on_batch: called with each mini-batch once it is written.
    """

    def __init__(
        self,
        store: ProductStore,
        execution: Execution,
        means: Centred | None = None,
        on_pairs: Callable[[int], None] = lambda count: None,
        on_batch: Callable[[StoredBatch], None] = lambda batch: None,
    ) -> None:
        super().__init__(execution, means, on_pairs, bounds=True, alike=True)
        self._store, self._on_batch = store, on_batch
        self._work: Mapping[str, ModelWork] = {}

    def expect(self, batch: StoredBatch, work: Mapping[str, ModelWork]) -> None:
        """Say which mini-batch comes next, and what is to be computed of it: model -> work."""
        self._stored, self._work = batch, work

    def methods_of(self, model: str, layer: str) -> Mapping[str, Matching]:
        """See `ProductConsumer`; {} for a layer that the store has."""
        layers = self._work[model].layers if model in self._work else {}
        return layers.get(finished_name(layer, layers), {})

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`; layers that the store has are passed over."""
        if self.methods_of(model, layer):
            super().take(model, layer, representation)

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        super().end({taken: layer for taken, layer in names.items() if taken in self._open})

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        for model, work in self._work.items():
            absent = [layer for layer in work.layers if (model, layer) not in layers]
            if absent:
                raise LayerError(
                    f"layer {absent[0]!r} of model {model!r} ran for the first images, but not for mini-batch "
                    f"{self._stored.number}; leave it out"
                )
        if images != len(self._stored):
            raise ComparisonError(f"a mini-batch of {images} images, where the store expects {len(self._stored)}")
        return True

    def _add(self, batch: ImageBatch, taken: Products) -> None:
        self._await((self._stored, self._work), taken)

    def _finish_batch(self, batch: Any, taken: Products) -> None:
        stored, of_models = batch
        for model, work in of_models.items():
            matched: list[MatchedProducts] = []
            for layer in work.layers:
                part = taken[model, layer]
                assert part.work is not None
                with naming(model, layer):
                    matched += part.work.matched().values()
            self._store.write(work.wanted, stored, matched)
        self._on_batch(stored)
