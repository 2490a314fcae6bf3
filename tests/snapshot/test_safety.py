"""Which processes may be mapped: each trait that forbids it, and the machine code that is looked for."""

from hypothesis import given
from hypothesis import strategies as st

from hotstart.snapshot.safety import WINDOW_BYTES, Traits, makes_raw_calls, why_unsafe

SAFE = Traits(shim=True, root="/")


def test_a_process_with_the_shim_and_nothing_else_odd_is_safe():
    assert why_unsafe(SAFE) is None


def test_without_the_shim_a_process_is_unsafe():
    assert "preload shim is not in it" in why_unsafe(Traits(shim=False, root="/"))


def test_a_process_with_another_root_is_unsafe():
    assert "/srv/jail" in why_unsafe(Traits(shim=True, root="/srv/jail"))


def test_a_process_with_code_that_calls_past_the_c_library_is_unsafe_and_the_code_is_named():
    assert why_unsafe(Traits(True, "/", ("/opt/lib.so", "/opt/other.so"))).startswith("/opt/lib.so calls madvise")


def test_the_ways_in_which_compilers_and_go_call_madvise_and_mremap_are_seen():
    for code in (
        "b81c0000000f05",  # glibc: mov $28,%eax; syscall
        "b8190000000f05",
        "48c7c01c0000000f05",  # Go: mov $28,%rax; syscall
        "b8190000004d89ca4989d80f05",  # libasan's mremap: two moves in between
        "6a1c580f05",  # clang -Os: push $28; pop %rax
    ):
        assert makes_raw_calls(bytes.fromhex(code)), code


def test_other_calls_and_numbers_that_do_not_reach_the_call_are_not_taken_for_them():
    for code in (
        "b80b0000000f05",  # munmap
        "b81c000000c3b80b0000000f05",  # return 28; then another function
        "b80b0000000f05b81c000000",  # the number comes after the call
        "b81c000000" + "90" * WINDOW_BYTES + "0f05",
        "b81c000000",
        "0f05",
        "",
    ):
        assert not makes_raw_calls(bytes.fromhex(code)), code


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_raw_call_is_seen_wherever_it_lies(before, after):
    assert makes_raw_calls(before + b"\x90" + bytes.fromhex("48c7c01c0000000f05") + after)
