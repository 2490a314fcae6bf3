"""hotstart doctor."""

from __future__ import annotations

from hotstart.cli.common import open_hotstart, parser, print_json


def main(arguments: list[str], _entered: float) -> int:
    """Examine this machine."""
    from hotstart.api.doctoring import examine

    p = parser("doctor", "Can this machine do it? Each check, why it fails, what to do.")
    p.add_argument("--gpu", action="store_true", help="a GPU is required, and a snapshot with device memory is tried")
    options = p.parse_args(arguments)
    checks = examine(open_hotstart(), gpu=options.gpu)
    ok = all(c.ok for c in checks if c.required)
    if options.json:
        print_json({"ok": ok, "checks": checks})
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL' if check.required else 'note'}  {check.name:<21} {check.detail}")
            if not check.ok:
                print(f"      {'':<21} -> {check.remedy}")
        print("this machine can do it" if ok else "this machine cannot do it yet")
    return 0 if ok else 5
