"""The C++ library as its users meet it: installed, found by find_package, linked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crosspoint

pytestmark = pytest.mark.timeout(2400)  # the first to run compiles the kernels

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "cpp" / "example"
BUILD = ROOT / "build" / "cmake" / "release"  # where `make cpp` builds, so that neither compiles twice


def run(*command: str | Path, **env: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # this environment's cmake
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def install(prefix: Path, *, shared: bool) -> Path:
    """The library built and installed; a shared one is linked from the same objects as a static one."""
    run("cmake", "-S", ROOT, "-B", BUILD, f"-DBUILD_SHARED_LIBS={'ON' if shared else 'OFF'}")
    run("cmake", "--build", BUILD, "--target", "crosspoint", "--parallel", os.environ.get("MAX_JOBS") or "2")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("prefix"), shared=False)


def built_example(tmp_path: Path, prefix: Path) -> Path:
    source = shutil.copytree(EXAMPLE, tmp_path / "example")  # away from this repository's headers
    run("cmake", "-S", source, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "build")
    return tmp_path / "build" / "example"


def test_a_project_finds_the_installed_library(installed, tmp_path):
    example = built_example(tmp_path, installed)
    # Point 0 is the first sample; the neighbours of the next one begin with itself.
    said = run(example)
    point, neighbours = re.search(r"neighbours of point (\d+):((?: \d+){8})\n", said).groups()
    assert neighbours.split()[0] == point and len(set(neighbours.split())) == 8
    low = run(example, CROSSPOINT_CPU="baseline")
    assert low.startswith("kernels: baseline\n") and low.splitlines()[1] == said.splitlines()[1]


def test_a_project_links_the_shared_library(installed, tmp_path):
    try:
        install(tmp_path / "prefix", shared=True)
    finally:
        run("cmake", "-S", ROOT, "-B", BUILD, "-DBUILD_SHARED_LIBS=OFF")
    example = built_example(tmp_path, tmp_path / "prefix")
    static = built_example(tmp_path / "static", installed)
    assert run(example) == run(static)
    assert "libcrosspoint.so" in run("ldd", example) and "libcrosspoint" not in run("ldd", static)


def test_only_public_headers_are_installed(installed):
    headers = {str(path.relative_to(installed / "include")) for path in (installed / "include").rglob("*.h")}
    public = {f"crosspoint/{path.name}" for path in (ROOT / "csrc" / "include" / "crosspoint").glob("*.h")}
    assert headers == public and "crosspoint/knn.h" in headers  # and none of csrc/cpu


def test_each_public_header_stands_alone(installed, tmp_path):
    for header in sorted((installed / "include").rglob("*.h")):
        (tmp_path / "one.cpp").write_text(f'#include "crosspoint/{header.name}"\n')
        flags = (
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-fsyntax-only",
            f"-I{installed / 'include'}",
        )
        run(os.environ.get("CXX", "c++"), *flags, tmp_path / "one.cpp")


@pytest.mark.parametrize(("asked", "found"), [(crosspoint.__version__, True), ("99", False)])
def test_the_version_is_the_package_s(installed, tmp_path, asked, found):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(versions LANGUAGES CXX)\n"
        f"find_package(crosspoint {asked})\n"
        'message(STATUS "found: ${crosspoint_FOUND} ${crosspoint_VERSION}")\n'
    )
    said = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    assert (f"found: 1 {crosspoint.__version__}" in said) is found
    assert ("found: 0" in said) is not found


@pytest.mark.parametrize(("language", "file"), [("cmake", "CMakeLists.txt"), ("cpp", "main.cpp")])
def test_the_documentation_shows_the_example(language, file):
    shown = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text(), re.S)
    assert shown == [(EXAMPLE / file).read_text()]
