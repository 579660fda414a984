"""The emitted C as packages of Arduino, PlatformIO, Zephyr and ESP-IDF, and its example."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import yaml
from cli_run import Cli
from test_c_backend import CASES, Planned, needs_gcc, planned
from test_cli import BUDGET, MODEL
from test_regions import split

from odt_plan.backends.c import ECOSYSTEMS, emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import OdtPlanError
from odt_plan.ir.training import TrainingSpec

STRICT = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror")
SEMVER = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}")
#: A title that ends strings and comments, and looks like variables of make, CMake and the shell.
HOSTILE = 'é "net" ${MODEL} $(shell) \\ */ # :\n - ='
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ARDUINO = """\
#include <stdint.h>
#include <stdio.h>
struct Port {
    void begin(long) {}
    void print(const char *text) { printf("%s", text); }
    void print(uint32_t number) { printf("%u", (unsigned)number); }
    void println(int number) { printf("%d\\n", number); }
    void println(double number, int digits) { printf("%.*f\\n", digits, number); }
};
static Port Serial;
inline void delay(unsigned long) {}
"""
SKETCH = """\
#include "Train.ino"
int main() {
    setup();
    for (int i = 0; i < 200; i++) { loop(); }
    return status;
}
"""
ZEPHYR = {
    "zephyr/kernel.h": "#define k_yield() ((void)0)\n",
    "zephyr/sys/printk.h": "#include <stdio.h>\n#define printk printf\n",
}
FREERTOS = {
    "freertos/FreeRTOS.h": "#include <stdint.h>\n",
    "freertos/task.h": "#define vTaskDelay(ticks) ((void)(ticks))\n",
}


@dataclass(frozen=True)
class Package:
    """A folder for all ecosystems at once, with the plan that it is of."""

    folder: Path
    made: Planned

    def text(self, name: str) -> str:
        """A file."""
        return (self.folder / name).read_text("ascii")

    def data(self, name: str) -> Any:
        """A file in JSON or YAML."""
        return yaml.safe_load(self.text(name))

    @property
    def sources(self) -> list[str]:
        """Names in src/ that a build compiles."""
        return sorted(p.name for p in (self.folder / "src").glob("*.c"))


def hostile(name: str) -> Planned:
    plan, training = planned(nets.mlp())
    model = plan.model.model_copy(update={"name": name})
    return plan.model_copy(update={"model": model}), training


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("package")
    made = hostile(HOSTILE)
    library = emit_c(*made, folder, name="net", ecosystems=ECOSYSTEMS)
    assert {*library} == {*(folder / "src").iterdir()}
    return Package(folder, made)


@pytest.fixture(scope="module")
def objects(package: Package, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All of src/, as PlatformIO compiles it."""
    folder = tmp_path_factory.mktemp("objects")
    flags = package.data("library.json")["build"]["flags"]
    sources = [package.folder / "src" / s for s in package.sources]
    subprocess.run(["gcc", *flags, "-c", *sources], cwd=folder, check=True)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[Path]]:
    """Compiles a plain library; kernels, which models share, once."""
    kernels = tmp_path_factory.mktemp("kernels")

    def objects_of(library: Path) -> list[Path]:
        result = []
        for source in sorted(library.glob("*.c")):
            place = kernels if source.name.startswith("odtplan_") else library
            result.append(place / f"{source.stem}.o")
            if not result[-1].exists():
                told_by(["gcc", "-c", source, "-o", result[-1]])
        return result

    return objects_of


def written(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def told_by(command: Sequence[str | Path]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def expected(made: Planned) -> str:
    """What the example must tell: the reference runtime, on the data that the example makes up."""
    runtime, lines = Runtime(*made), []
    classes, at = 4, np.arange(8)
    for update in range(100):
        kind = update % classes
        x = ((at * 7 + kind * 5) % 16).astype("f4") / 16
        loss = runtime.train_step(x[None], np.array([kind], "i4"), float(np.float32(0.01)))
        if update % 10 == 9:
            lines.append(f"update {update + 1}: loss {np.float32(loss):.6f}\n")
    return "".join(lines)


# -- One library ----------------------------------------------------------------------------------


def test_the_library_lies_unchanged_in_src(package: Package, tmp_path: Path) -> None:
    listed = emit_c(*package.made, tmp_path, name="net")
    there = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {*there} == {*listed, tmp_path / "examples" / "main.c"}
    names = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in there}
    cmake = names.pop("CMakeLists.txt")
    assert names.pop("examples/main.c") == package.text("examples/main.c")
    assert cmake.startswith(package.text("src/CMakeLists.txt"))
    inside = {p.name: p.read_text() for p in (package.folder / "src").iterdir()}
    inside.pop("CMakeLists.txt")
    assert inside == names
    assert not list(package.folder.glob("*.[ch]"))


@pytest.mark.parametrize("name", ECOSYSTEMS)
def test_one_ecosystem_alone_is_that_part_of_all(
    package: Package, name: str, tmp_path: Path
) -> None:
    emit_c(*package.made, tmp_path, name="net", ecosystems=[name])
    for path in tmp_path.rglob("*"):
        there = package.folder / path.relative_to(tmp_path)
        if path.is_file() and (path.name != "CMakeLists.txt" or "src" in path.parts):
            assert path.read_bytes() == there.read_bytes(), there
    marks = {
        "arduino": "library.properties",
        "platformio": "library.json",
        "zephyr": "zephyr/module.yml",
        "espidf": "idf_component.yml",
    }
    assert [e for e, mark in marks.items() if (tmp_path / mark).exists()] == [name]
    assert ("idf_component_register" in (tmp_path / "CMakeLists.txt").read_text()) == (
        name == "espidf"
    )


# -- Metadata -------------------------------------------------------------------------------------


def test_arduino_properties(package: Package) -> None:
    """As Arduino's library specification, 1.5 format, wants them."""
    lines = package.text("library.properties").splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    assert len(properties) == len(lines)
    required = {"name", "version", "author", "maintainer", "sentence", "paragraph", "url"}
    assert required <= properties.keys()
    assert required | {"category", "architectures", "includes", "dot_a_linkage"} == set(properties)
    assert all(properties.values())
    assert re.fullmatch(r"[a-z][a-z0-9_.-]{0,62}", properties["name"])
    assert SEMVER.fullmatch(properties["version"])
    assert properties["category"] == "Data Processing"
    assert properties["dot_a_linkage"] == "true"  # kernels of several models: one of each
    assert (package.folder / "src" / properties["includes"]).is_file()


def test_arduino_sketch_has_the_name_of_its_folder(package: Package) -> None:
    (sketch,) = package.folder.rglob("*.ino")
    assert sketch.relative_to(package.folder).as_posix() == "examples/Train/Train.ino"


def test_platformio_manifest(package: Package) -> None:
    manifest = json.loads(package.text("library.json"))
    known = {"name", "version", "description", "keywords", "frameworks", "platforms", "headers"}
    assert manifest.keys() == known | {"build", "examples"}
    assert re.fullmatch(r"[^:;/,@<>]{1,50}", manifest["name"])
    assert SEMVER.fullmatch(manifest["version"])
    assert all(re.fullmatch(r"[a-z\d\-_+. ]{1,50}", k) for k in manifest["keywords"])
    assert "-ffp-contract=off" in manifest["build"]["flags"]
    for example in manifest["examples"]:
        assert example.keys() == {"name", "base", "files"}
        base = package.folder / example["base"]
        assert all((base / f).is_file() for f in example["files"])
        assert (base / "../..").resolve() == package.folder.resolve()  # the ini's symlink://../..


@pytest.mark.parametrize(
    ("name", "frameworks"), [("library.json", ["*"]), ("library.properties", ["arduino"])]
)
def test_platformio_takes_the_manifests(
    package: Package, name: str, frameworks: list[str]
) -> None:
    """By its own parsers and schema; it reads Arduino's libraries, too."""
    parser = pytest.importorskip("platformio.package.manifest.parser")
    schema = pytest.importorskip("platformio.package.manifest.schema")
    manifest = parser.ManifestParserFactory.new_from_file(str(package.folder / name))
    found = schema.ManifestSchema().load_manifest(manifest.as_dict())
    assert (found["name"], found["version"], found["frameworks"]) == ("net", "1.0.0", frameworks)
    assert found["platforms"] == ["*"]
    assert '"net" ${MODEL} $(shell)' in found["description"]


def test_espressif_takes_the_manifest(package: Package) -> None:
    """By the schema of its component manager."""
    manager = pytest.importorskip("idf_component_tools.manager")
    found = manager.ManifestManager(str(package.folder), "net").load()
    assert str(found.version) == "1.0.0"
    assert [e["path"] for e in found.examples] == ["examples/espidf"]
    assert str(found.dependencies["idf"]) == ">=4.4"


def test_zephyr_module(package: Package) -> None:
    """Keys of the schema of Zephyr's module.yml, and the files that its build looks for."""
    module = package.data("zephyr/module.yml")
    assert module.keys() <= {"name", "build", "tests", "samples", "boards", "blobs", "security"}
    assert module["name"] == "net"
    assert module["build"].keys() <= {"cmake", "kconfig", "depends", "settings"}
    assert (package.folder / module["build"]["cmake"] / "CMakeLists.txt").is_file()
    assert (package.folder / module["build"]["kconfig"]).is_file()
    for samples in module["samples"]:
        (sample,) = (package.folder / samples).glob("*/sample.yaml")
        assert list(yaml.safe_load(sample.read_text())) == ["sample", "tests"]
        assert {p.name for p in sample.parent.iterdir()} >= {"CMakeLists.txt", "prj.conf", "src"}


def test_zephyr_kconfig(package: Package, tmp_path: Path) -> None:
    kconfiglib = pytest.importorskip("kconfiglib")
    root = tmp_path / "Kconfig"
    others = {"CBPRINTF_FP_SUPPORT": "bool", "SPEED_OPTIMIZATIONS": "bool"}
    others["MAIN_STACK_SIZE"] = "int"
    text = 'config CPU_HAS_FPU\n\tdef_bool y\nconfig FPU\n\tbool "f"\n\tdepends on CPU_HAS_FPU\n'
    text += "".join(f'config {n}\n\t{kind} "{n}"\n' for n, kind in others.items())
    root.write_text(f'{text}source "{package.folder / "zephyr" / "Kconfig"}"\n')
    found = kconfiglib.Kconfig(str(root), warn_to_stderr=False)
    found.load_config(str(package.folder / "samples" / "train" / "prj.conf"))
    assert found.warnings == []
    values = {n: found.syms[n].str_value for n in ("ODTPLAN_NET", "ODTPLAN_NET_SELFTEST", "FPU")}
    assert values == {"ODTPLAN_NET": "y", "ODTPLAN_NET_SELFTEST": "n", "FPU": "y"}


def test_espidf_manifest(package: Package) -> None:
    manifest = package.data("idf_component.yml")
    assert manifest.keys() == {"version", "description", "dependencies", "examples"}
    assert SEMVER.fullmatch(manifest["version"])
    assert re.fullmatch(r">=\d\.\d", manifest["dependencies"]["idf"])
    for example in manifest["examples"]:
        base = package.folder / example["path"]
        assert {p.name for p in base.iterdir()} >= {"CMakeLists.txt", "main", "sdkconfig.defaults"}
        assert (base / "../..").resolve() == package.folder.resolve()


# -- Examples -------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize(
    ("main", "stubs", "options"),
    [
        ("examples/main.c", {}, ()),
        ("examples/platformio/src/main.c", {}, ()),
        ("samples/train/src/main.c", ZEPHYR, ()),
        ("examples/espidf/main/main.c", FREERTOS, ("-Dapp_main=run", "main.c")),
    ],
)
def test_an_example_learns_what_numpy_does(
    package: Package,
    objects: list[Path],
    tmp_path: Path,
    main: str,
    stubs: dict[str, str],
    options: tuple[str, ...],
) -> None:
    entry = {"main.c": "void run(void);\nint main(void) {\n    run();\n    return 0;\n}\n"}
    written(tmp_path, {**stubs, **entry})
    flags = ["-std=c99", *STRICT, f"-I{package.folder / 'src'}", f"-I{tmp_path}"]
    more = [o if o.startswith("-") else tmp_path / o for o in options]
    program = tmp_path / "program"
    told_by(["gcc", *flags, package.folder / main, *more, *objects, "-o", program])
    assert told_by([program]) == expected(package.made)


@needs_gcc
@needs_gxx
def test_the_sketch_learns_what_numpy_does(
    package: Package, objects: list[Path], tmp_path: Path
) -> None:
    """In C++, with all of src/ in the link, as Arduino builds it."""
    written(tmp_path, {"Arduino.h": ARDUINO, "sketch.cpp": SKETCH})
    folders = [tmp_path, package.folder / "src", package.folder / "examples" / "Train"]
    flags = ["-std=gnu++11", *STRICT, *(f"-I{f}" for f in folders)]
    program = tmp_path / "program"
    told_by(["g++", *flags, tmp_path / "sketch.cpp", *objects, "-o", program])
    assert told_by([program]) == expected(package.made)


def two_heads() -> Planned:
    from test_several_outputs import two_heads as forward

    return planned(forward())


EXAMPLES: dict[str, Callable[[], Planned]] = {
    **{
        name: CASES[name]
        for name in (
            "mlp-mse",
            "mlp-bce",
            "recurrent",
            "cnn-micro",
            "cnn-paged",
            "cnn-overlapped",
            "cnn-i8-input",
        )
    },
    "indices": lambda: planned(nets.tokens(entries=9)),
    "two-inputs": lambda: planned(nets.two_branches()),
    "two-outputs": two_heads,
}


@needs_gcc
@pytest.mark.parametrize("case", EXAMPLES)
def test_every_model_has_an_example_that_runs(
    case: str, compiled: Callable[[Path], list[Path]], tmp_path: Path
) -> None:
    """Sanitized, but for the library: other tests see to that."""
    emit_c(*EXAMPLES[case](), tmp_path)
    program = tmp_path / "program"
    flags = ["-std=c99", *STRICT, f"-I{tmp_path}", "-fsanitize=address,undefined"]
    main = tmp_path / "examples" / "main.c"
    told_by(["gcc", *flags, main, *compiled(tmp_path), "-o", program])
    losses = [float(line.rsplit(" ", 1)[1]) for line in told_by([program]).splitlines()]
    assert len(losses) == 10
    assert np.isfinite(losses).all()


@needs_cmake
def test_cmake_builds_the_example(package: Package, tmp_path: Path) -> None:
    told_by(["cmake", "-S", package.folder, "-B", tmp_path, "-DNET_EXAMPLE=ON"])
    told_by(["cmake", "--build", tmp_path])
    assert told_by([tmp_path / "net_example"]) == expected(package.made)


# -- Builds of the ecosystems, their CMake functions reduced to what a package calls --------------

ZEPHYR_CMAKE = """\
cmake_minimum_required(VERSION 3.20)
project(app C)
set(CONFIG_ODTPLAN_NET 1)
set(CONFIG_ODTPLAN_SECOND 1)
set(CONFIG_ODTPLAN_SECOND_SELFTEST 1)
set(CONFIG_CPU_CORTEX_M4 1)
macro(zephyr_library_named name)
  set(CURRENT ${name})
  add_library(${name} STATIC)
  set_property(GLOBAL APPEND PROPERTY LIBS ${name})
endmacro()
function(zephyr_include_directories)
  include_directories(${ARGN})
  set_property(GLOBAL APPEND PROPERTY FOLDERS ${ARGN})
endfunction()
function(zephyr_library_sources)
  target_sources(${CURRENT} PRIVATE ${ARGN})
endfunction()
function(zephyr_library_compile_options)
  target_compile_options(${CURRENT} PRIVATE ${ARGN})
endfunction()
function(zephyr_library_compile_definitions)
  target_compile_definitions(${CURRENT} PRIVATE ${ARGN})
endfunction()
add_subdirectory(@first@/zephyr one)
add_subdirectory(@second@/zephyr two)
get_property(libs GLOBAL PROPERTY LIBS)
get_property(folders GLOBAL PROPERTY FOLDERS)
add_executable(app both.c)
target_include_directories(app PRIVATE ${folders})
target_link_libraries(app PRIVATE -Wl,--whole-archive ${libs} -Wl,--no-whole-archive)
"""
BOTH = """\
#include "net.h"
#include "second.h"
int main(void) {
    static net_t net;
    static second_t second;
    const int status = net_init(&net);
    return status != ODTPLAN_OK ? status : second_selftest(&second);
}
"""


@needs_gcc
@needs_cmake
def test_two_models_are_modules_of_one_zephyr_application(
    package: Package, tmp_path: Path
) -> None:
    """Zephyr links whole archives: a kernel that both bring would be defined twice."""
    second = tmp_path / "second"
    made = planned(nets.mlp(), TrainingSpec(loss="mse"))
    emit_c(*made, second, name="second", ecosystems=["zephyr"])
    text = ZEPHYR_CMAKE.replace("@first@", str(package.folder)).replace("@second@", str(second))
    app = written(tmp_path / "app", {"CMakeLists.txt": text, "both.c": BOTH})
    build = tmp_path / "build"
    told_by(["cmake", "-S", app, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"])
    told_by(["cmake", "--build", build])
    told_by([build / "app"])
    commands = json.loads((build / "compile_commands.json").read_text())
    compiled = [Path(c["file"]) for c in commands if Path(c["file"]).name != "both.c"]
    for name in {p.name for p in compiled if p.name.startswith("odtplan_")}:
        assert [p.name for p in compiled].count(name) == 1
    assert "net_selftest.c" not in [p.name for p in compiled]
    for command in commands:
        if not command["file"].endswith("both.c"):
            assert "-ffp-contract=off" in command["command"]
            assert "-DODTPLAN_NO_VMLA" in command["command"]


ESPIDF_CMAKE = """\
cmake_minimum_required(VERSION 3.16)
project(app C)
set(ESP_PLATFORM 1)
macro(idf_component_register)
  cmake_parse_arguments(_ "" "" "SRCS;INCLUDE_DIRS" ${ARGN})
  set(COMPONENT_LIB component)
  add_library(component STATIC ${__SRCS})
  target_include_directories(component PUBLIC ${__INCLUDE_DIRS})
endmacro()
add_subdirectory(@package@ component)
add_executable(app @package@/examples/espidf/main/main.c run.c)
target_compile_definitions(app PRIVATE app_main=run)
target_include_directories(app PRIVATE .)
target_link_libraries(app PRIVATE component)
"""


@needs_gcc
@needs_cmake
def test_espidf_component_builds(tmp_path: Path) -> None:
    """Arrays of RAM regions lie in .bss: ESP-IDF's linker script has no sections for them."""
    made = split(nets.mlp(), TrainingSpec(), 0.5)
    emit_c(*made, tmp_path / "package", ecosystems=["espidf"])
    text = ESPIDF_CMAKE.replace("@package@", str(tmp_path / "package"))
    entry = {"run.c": "void run(void);\nint main(void) {\n    run();\n    return 0;\n}\n"}
    app = written(tmp_path / "app", {"CMakeLists.txt": text, **entry, **FREERTOS})
    build = tmp_path / "build"
    told_by(["cmake", "-S", app, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"])
    told_by(["cmake", "--build", build])
    assert told_by([build / "app"]) == expected(made)
    sections = told_by(["objdump", "-h", next(build.rglob("mlp.c.o"))])
    assert ".bss" in sections
    assert "odt_plan" not in sections
    commands = json.loads((build / "compile_commands.json").read_text())
    compiled = [c["command"] for c in commands if "package/src" in c["file"]]
    assert len(compiled) == len(list((tmp_path / "package" / "src").glob("*.c")))
    assert all("-ffp-contract=off" in c for c in compiled)


# -- The command line -----------------------------------------------------------------------------


def test_from_the_command_line(odt: Cli, tmp_path: Path) -> None:
    """What is not ours stays, and nothing is half there."""
    words = (MODEL, *BUDGET, "-q", "--emit", "arduino,zephyr", "-o")
    assert odt(*words, "out").code == 0
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert made >= {"plan.json", "library.properties", "zephyr/module.yml", "src/digits_cnn.h"}
    assert not any(part.startswith(".") for name in made for part in Path(name).parts)
    foreign = written(tmp_path / "mine", {"zephyr/Kconfig": "mine", "src/main.c": "mine"})
    done = odt(*words, "mine")
    assert done.code == 2
    assert done.error == (
        "mine/zephyr/Kconfig: exists; choose another -o, or write over it: --force"
    )
    kept = {p.relative_to(foreign).as_posix() for p in foreign.rglob("*") if p.is_file()}
    assert kept == {"zephyr/Kconfig", "src/main.c"}
    assert odt(*words, "mine", "--force").code == 0
    assert (foreign / "zephyr" / "Kconfig").read_text() != "mine"
    assert (foreign / "src" / "main.c").read_text() == "mine"


@pytest.mark.parametrize(
    ("emitted", "told"),
    [
        ("arduino,mbed", "--emit: 'mbed' is not one of c, host, arduino, platformio, zephyr, espi"),
        ("host,espidf", "--emit host: its program would be compiled into the package for espidf;"),
    ],
)
def test_what_can_not_be_emitted(odt: Cli, tmp_path: Path, emitted: str, told: str) -> None:
    done = odt(MODEL, *BUDGET, "--emit", emitted, "-o", "out")
    assert done.code == 2
    assert done.error.startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_emitted_from_python(package: Package, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mbed' is not one of arduino, platformio, zephyr, espi"):
        emit_c(*package.made, tmp_path, ecosystems=["mbed"])
    with pytest.raises(ValueError, match="a package holds no program"):
        emit_c(*package.made, tmp_path, host=True, ecosystems=["zephyr"])
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, last = Path.write_text, "idf_component.yml"

    def failing(self: Path, *args: Any, **kwargs: Any) -> int:
        if last in self.name:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OdtPlanError, match="No space left on device"):
        emit_c(*package.made, tmp_path, ecosystems=ECOSYSTEMS)
    assert list(tmp_path.iterdir()) == []
