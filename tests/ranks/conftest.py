"""What is run by processes of their own has no doctests to collect, and is slow to import."""

from pathlib import Path

collect_ignore = [
    path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
]
