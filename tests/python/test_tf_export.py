import functools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhizhi.python.tf_export import Export, Partial, Registry


@pytest.fixture
def registry():
    return Registry("demo")


@pytest.fixture
def export(registry):
    return functools.partial(Export, registry=registry)


def record(*args, **keywords):
    return args, keywords


# Partial


values = st.lists(st.integers(), max_size=3)
named = st.dictionaries(st.sampled_from("abc"), st.integers())


@given(values, named, values, named, values, named)
def test_partial_equals_functools_also_of_a_partial(a, k, b, m, c, n):
    ours, theirs = Partial(record, *a, **k), functools.partial(record, *a, **k)
    assert ours(*c, **n) == theirs(*c, **n) == ((*a, *c), {**k, **n})
    ours, theirs = Partial(ours, *b, **m), functools.partial(theirs, *b, **m)
    assert (ours.func, ours.args, ours.keywords) == (theirs.func, theirs.args, theirs.keywords)
    assert ours(*c, **n) == theirs(*c, **n)


def test_a_fixed_keyword_is_a_default_and_a_fixed_position_is_not():
    power = Partial(pow, 2)
    assert power(5) == 32
    assert Partial(pow, exp=5)(2) == 32
    assert Partial(pow, exp=5)(2, exp=3) == 8
    with pytest.raises(TypeError, match="multiple values"):
        Partial(lambda x: x, 1)(x=2)


def test_a_partial_is_pickled_with_its_arguments():
    again = pickle.loads(pickle.dumps(Partial(record, 1, a=2)))
    assert again(3) == ((1, 3), {"a": 2})


def test_a_partial_takes_keywords_named_self_and_func():
    assert Partial(record, self=1)(func=2) == ((), {"self": 1, "func": 2})


def test_what_cannot_be_called_is_refused():
    message = r"^3 cannot be called: the first argument must be a callable\.$"
    with pytest.raises(TypeError, match=message):
        Partial(3)


# Export


def test_the_decorator_is_two_calls_and_returns_the_object_itself(registry):
    def f():
        """A function."""

    assert Export("a.f", registry=registry)(f) is f
    assert (f.__name__, f.__qualname__.split(".")[-1]) == ("f", "f")
    assert registry.lookup("a.f") is f
    assert registry.names(f) == ("a.f",)


def test_the_first_name_is_canonical_and_all_lead_to_one_object(registry, export):
    @export("nn.relu", "relu", "compat.relu")
    class Relu:
        pass

    assert registry.canonical_name(Relu) == "nn.relu"
    assert {registry.lookup(name) for name in registry} == {Relu}
    assert list(registry) == ["nn.relu", "relu", "compat.relu"]


def test_a_subclass_does_not_inherit_the_names(registry, export):
    @export("Layer")
    class Layer:
        pass

    class Dense(Layer):
        pass

    assert getattr(Dense, registry.attribute) == ("Layer",)
    assert registry.canonical_name(Dense) is None
    export("Dense")(Dense)
    assert (registry.canonical_name(Dense), registry.canonical_name(Layer)) == ("Dense", "Layer")


def test_the_names_belong_to_the_function_below_its_decorators(registry, export):
    def f():
        return 1

    @functools.wraps(f)
    def logged():
        return f() + 1

    export("f")(logged)
    assert registry.lookup("f") is logged
    assert registry.canonical_name(logged) == registry.canonical_name(f) == "f"
    assert registry.attribute in vars(f)


def test_two_apis_do_not_see_each_other(registry, export):
    other = Registry("other")

    @Export("x.f", registry=other)
    @export("f")
    def f():
        pass

    assert (registry.canonical_name(f), other.canonical_name(f)) == ("f", "x.f")


def test_objects_that_were_never_exported_have_no_name(registry):
    assert registry.canonical_name(len.__class__) is None
    assert registry.canonical_name(lambda: 0) is None


def test_constants_are_added_by_name(registry):
    registry.add("consts.pi", 3.14)
    assert registry.build().consts.pi == 3.14


def test_the_tree_has_a_module_for_each_namespace(registry, export):
    @export("a.b.f", "a.g")
    def f():
        return 7

    root = registry.build()
    assert (root.__name__, root.a.__name__, root.a.b.__name__) == ("demo", "demo.a", "demo.a.b")
    assert root.a.b.f is root.a.g is f
    assert root is not registry.build()


def test_the_mapping_of_names_cannot_be_changed_from_outside(registry):
    with pytest.raises(TypeError, match="does not support item assignment"):
        registry.symbols["x"] = 1


# Refusals


def test_no_names_are_refused(registry):
    with pytest.raises(ValueError, match=r"^no names: at least one is needed\.$"):
        Export(registry=registry)


@pytest.mark.parametrize("name", ["", "a..b", "a.1", "a b", "nn.class"])
def test_a_name_that_is_not_dotted_is_refused(registry, name):
    with pytest.raises(ValueError, match=rf"^'{name}' is not a dotted name\.$"):
        registry.add(name, 1)


def test_a_taken_name_is_refused_and_nothing_of_the_export_stays(registry, export):
    registry.add("f", 1)

    def g():
        pass

    with pytest.raises(ValueError, match=r"^'f' is 1: it cannot be <function .* too\.$"):
        export("g", "f")(g)
    assert list(registry) == ["f"]
    assert registry.canonical_name(g) is None
    assert export("g")(g) is g


def test_exporting_an_object_twice_is_refused(registry, export):
    @export("f")
    def f():
        pass

    message = r"^<function .*> is exported as \('f',\): it cannot be \('g',\) too\.$"
    with pytest.raises(ValueError, match=message):
        export("g")(f)


@pytest.mark.parametrize(("first", "second"), [("a", "a.b"), ("a.b", "a"), ("a.b.c", "a")])
def test_a_name_cannot_be_a_namespace_and_a_value(registry, first, second):
    registry.add(first, 1)
    message = rf"^'{second}' and '{first}': one would be a namespace and a value\.$"
    with pytest.raises(ValueError, match=message):
        registry.add(second, 2)
    assert list(registry) == [first]


def test_an_unknown_name_is_a_key_error(registry):
    with pytest.raises(KeyError, match="'nothing'"):
        registry.lookup("nothing")
