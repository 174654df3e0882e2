"""README, docs/, the course: code is quoted as it is, files and links exist, commands name options that there are."""

import importlib
import re
from pathlib import Path

import pytest

from reproduce import papers, results

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "course").glob("*.md"))]


def strip_lines(text):
    return "\n".join(line.strip() for line in text.strip("\n").splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link
    if page.name == "speed.md":
        return  # it names programs of the commits at which its numbers were measured
    for name in re.findall(r"`((?:[\w.]+/)*[\w-]+\.(?:py|cu|cpp))`", text):
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"tests/*/{name}")), name


def test_results_are_written_by_the_program_and_the_readme_counts_as_they_do():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page.startswith(results.PREFACE + results.write_status()), "python -m reproduce --results docs/results.md"
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (a, b, c, n), (*dd, dd_all), (*mfx, mfx_all) = map(papers.count_states, (None, *papers.ROWS))
    assert f"Of the {n} tables and figures of both papers" in text
    assert f"**{a} are done at toy size, {b} have a stand-in, {c} are absent**" in text
    said = "{}, {} and {} of Differential Diffusion's {}; {}, {} and {} of Magic Fixup's {}"
    assert said.format(*dd, dd_all, *mfx, mfx_all) in text


def test_the_walkthrough_quotes_the_code_as_it_is():
    sources = [strip_lines(path.read_text(encoding="utf-8")) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 10
    for block in blocks:
        assert any(strip_lines(block) in source for source in sources), block


def test_where_to_change_it_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| to change | open |"):].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert rows
    for row in rows:
        files, names = [], []
        for quoted in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if re.search(r"\.(py|cu)$", quoted):
                files.append((ROOT / quoted).read_text(encoding="utf-8"))
            else:
                names.append(quoted.split(".")[-1])
        assert files and all(any(re.search(rf"\b{name}\b", file) for file in files) for name in names), row


def test_the_readme_is_short_and_begins_with_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first, second = re.findall(r"```bash\n(.*?)```", text, re.S)[:2]
    assert "sample.py --image examples/meadow.png --change-map" in first and "python -m pytest -q" in second


def test_commands_name_options_that_there_are(capsys):
    helps = {}
    for name in ("sample.py", "data.py", "train.py", "reproduce", "bench", "reproduce.train_toys", "course",
                 "course.figures", "toy.clips"):
        module = name.removesuffix(".py") + ".__main__" * (name in ("reproduce", "bench", "course"))
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        helps[name] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for page in PAGES:
        for line in re.findall(r"^python .*$", page.read_text(encoding="utf-8"), re.M):
            name = re.match(r"python (?:-m )?([\w.]+)", line)[1]
            if name in helps:
                command = line.split("#")[0]
                assert set(re.findall(r"(?<!\S)--[a-z-]+", command)) <= helps[name], f"{page.name}: {line}"
