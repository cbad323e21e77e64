"""Against TensorFlow itself, where it is installed; it is not in the lock (1.6 GB)."""

import functools

import pytest

from zhizhi.python.tf_export import Export, Registry

pytestmark = pytest.mark.parity
peer = pytest.importorskip("tensorflow.python.util.tf_export")


def test_the_shortcut_is_a_partial_of_a_class():
    assert isinstance(peer.tf_export, functools.partial)
    assert peer.tf_export.func is peer.api_export
    assert peer.tf_export.keywords == {"api_name": "tensorflow"}


def test_both_return_the_object_and_agree_on_names_and_inheritance():
    registry = Registry("tf")
    ours = functools.partial(Export, registry=registry)

    @peer.tf_export("zz.f", "zz.g")
    @ours("zz.f", "zz.g")
    class Base:
        pass

    class Derived(Base):
        pass

    for symbol, name in ((Base, "zz.f"), (Derived, None)):
        assert peer.get_canonical_name_for_symbol(symbol) == name
        assert registry.canonical_name(symbol) == name
    assert peer.get_symbol_from_name("zz.g") is registry.lookup("zz.g") is Base


def test_tensorflow_overwrites_where_we_refuse():
    def f():
        pass

    peer.tf_export("zz.first")(f)
    peer.tf_export("zz.second")(f)
    assert peer.get_canonical_name_for_symbol(f) == "zz.second"
    assert peer.get_symbol_from_name("zz.first") is f  # the map remembers what the object forgot


def test_the_check_of_keras_names_is_a_prefix_of_letters():
    with pytest.raises(peer.InvalidSymbolNameError):
        peer.keras_export("layers.Dense")
    peer.keras_export("kerasish.Dense")  # no dot is asked for
