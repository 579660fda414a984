"""The emitted C as a package of Arduino, PlatformIO, Zephyr or ESP-IDF.

All that ``emit c`` gives lies unchanged in ``src/``; the metadata around it, of one ecosystem or
of several, names these files. Sources of the formats: Arduino's library specification (1.5 format,
rev. 2.2), PlatformIO's ``library.json``, Zephyr's ``zephyr/module.yml``, ESP-IDF's build system
and ``idf_component.yml``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

import yaml

#: What ``--emit`` knows beside the plain C library.
ECOSYSTEMS = ("arduino", "platformio", "zephyr", "espidf")

_FLAGS = ["-ffp-contract=off", "-fno-math-errno"]
_VERSION = "1.0.0"
#: PlatformIO takes no longer name, Arduino a few characters more.
_MOST_OF_NAME = 50


@dataclass(frozen=True)
class Library:
    """What packages tell of an emitted library.

    Attributes:
        model: Prefix of its symbols and files.
        title: Model and device, in printable ASCII.
        summary: A sentence about its sizes.
        files: The plain library by name: sources, headers, ``CMakeLists.txt``.
        placements: Macros that put arrays into sections of RAM regions.
        example: What the template of the example says.
    """

    model: str
    title: str
    summary: str
    files: Mapping[str, str]
    placements: Sequence[str]
    example: Mapping[str, str]

    @property
    def kernels(self) -> list[str]:
        """Sources that several models may share."""
        return [n for n in self.files if n.startswith("odtplan_") and n.endswith(".c")]

    @property
    def selftest(self) -> str:
        """Source of the golden self-test."""
        return f"{self.model}_selftest.c"

    @property
    def own(self) -> list[str]:
        """Sources of the model, without the self-test."""
        left_out = {*self.kernels, self.selftest}
        return [n for n in self.files if n.endswith(".c") and n not in left_out]

    def values(self) -> dict[str, str]:
        """What all templates may say."""
        return {
            "model": self.model,
            "MODEL": self.model.upper(),
            "title": self.title,
            "summary": self.summary,
            "package": self.model[:_MOST_OF_NAME].rstrip("_"),
            "version": _VERSION,
        }

    def filled(self, name: str, **values: str) -> str:
        """A template, with its values."""
        return Template(_template(name)).substitute(self.values(), **values)

    def program(self, includes: str, entry: str) -> str:
        """The example, up to its entry point."""
        return self.filled("example.c", includes=includes, **self.example) + entry

    def main(
        self,
        includes: str,
        *,
        signature: str = "int main(void)",
        tell: str = "printf",
        pause: str = "",
        end: str = "    return status;\n",
    ) -> str:
        """The example as a C program."""
        entry = self.filled("main.c", signature=signature, tell=tell, pause=pause, end=end)
        return self.program(includes, entry)


def packaged(library: Library, ecosystems: Collection[str]) -> dict[str, str]:
    """The files of a library with an example, and with the metadata of ecosystems.

    Args:
        library: The library.
        ecosystems: Of ``ECOSYSTEMS``; with any of them its files go to ``src/``.

    Returns:
        Texts by path in the folder.
    """
    files, example = library.files, library.filled("example.cmake")
    more = {"examples/main.c": library.main("#include <stdio.h>\n")}
    if not ecosystems:
        return {**files, "CMakeLists.txt": files["CMakeLists.txt"] + example} | more
    result = {f"src/{name}": text for name, text in files.items()} | more
    component = _component(library) if "espidf" in ecosystems else ""
    result["CMakeLists.txt"] = library.filled("CMakeLists.txt", component=component) + example
    for name in ecosystems:
        result |= _METADATA[name](library)
    return result


def _arduino(library: Library) -> dict[str, str]:
    sketch = library.program("#include <Arduino.h>\n", library.filled("arduino/Train.ino"))
    return {
        "library.properties": library.filled("arduino/library.properties"),
        "examples/Train/Train.ino": sketch,
    }


def _platformio(library: Library) -> dict[str, str]:
    base = "examples/platformio"
    values = library.values()
    manifest = {
        "name": values["package"],
        "version": _VERSION,
        "description": f"{library.title}: inference and training on the device.",
        "keywords": ["machine learning", "on-device training"],
        "frameworks": "*",
        "platforms": "*",
        "headers": f"{library.model}.h",
        "build": {"flags": ["-O2", *_FLAGS], "unflags": ["-Os"]},
        "examples": [{"name": "Train", "base": base, "files": ["platformio.ini", "src/main.c"]}],
    }
    return {
        "library.json": json.dumps(manifest, indent=2) + "\n",
        f"{base}/platformio.ini": library.filled("platformio/platformio.ini"),
        f"{base}/src/main.c": library.main("#include <stdio.h>\n"),
    }


def _zephyr(library: Library) -> dict[str, str]:
    module = {
        "name": library.model,
        "build": {"cmake": "zephyr", "kconfig": "zephyr/Kconfig"},
        "samples": ["samples"],
    }
    sample = {
        "sample": {"name": f"{library.model}: training", "description": library.title},
        "tests": {f"sample.{library.model}.train": {"build_only": True}},
    }
    main = library.main(
        "#include <zephyr/kernel.h>\n#include <zephyr/sys/printk.h>\n",
        tell="printk",
        pause="        k_yield();\n",
    )
    own = "\n".join(f"    ${{source_dir}}/{s}" for s in library.own)
    kernels = "\n".join(f"    {s}" for s in library.kernels)
    return {
        "zephyr/module.yml": _yaml(module),
        "zephyr/CMakeLists.txt": library.filled("zephyr/CMakeLists.txt", own=own, kernels=kernels),
        "zephyr/Kconfig": library.filled("zephyr/Kconfig"),
        "samples/train/CMakeLists.txt": library.filled("zephyr/sample.cmake"),
        "samples/train/prj.conf": library.filled("zephyr/prj.conf"),
        "samples/train/sample.yaml": _yaml(sample),
        "samples/train/src/main.c": main,
    }


def _espidf(library: Library) -> dict[str, str]:
    base = "examples/espidf"
    manifest = {
        "version": _VERSION,
        "description": f"{library.title}: inference and training on the device.",
        "dependencies": {"idf": ">=4.4"},
        "examples": [{"path": base}],
    }
    main = library.main(
        '#include <stdio.h>\n\n#include "freertos/FreeRTOS.h"\n#include "freertos/task.h"\n',
        signature="void app_main(void)",
        pause="        vTaskDelay(1); /* feeds the watchdog of the idle task */\n",
        end="",
    )
    return {
        "idf_component.yml": _yaml(manifest),
        f"{base}/CMakeLists.txt": library.filled("espidf/project.cmake"),
        f"{base}/sdkconfig.defaults": library.filled("espidf/sdkconfig.defaults"),
        # Vectors of a PC take up to 72 KB of stack.
        f"{base}/sdkconfig.defaults.linux": library.filled("espidf/sdkconfig.defaults.linux"),
        f"{base}/main/CMakeLists.txt": library.filled("espidf/main.cmake"),
        f"{base}/main/main.c": main,
    }


def _component(library: Library) -> str:
    """The part of the CMake file that is for ESP-IDF, where internal RAM is one for the linker."""
    sources = [*library.own, library.selftest, *library.kernels]
    placements = "".join(f' "{macro}="' for macro in library.placements)
    if placements:
        placements = f"  target_compile_definitions(${{COMPONENT_LIB}} PRIVATE{placements})\n"
    listed = "\n".join(f"      src/{s}" for s in sources)
    return library.filled("espidf/component.cmake", sources=listed, placements=placements)


_METADATA = {
    "arduino": _arduino,
    "platformio": _platformio,
    "zephyr": _zephyr,
    "espidf": _espidf,
}


def _yaml(data: Mapping[str, object]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False)


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")
