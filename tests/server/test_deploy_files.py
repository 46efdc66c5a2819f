"""Container, compose and Kubernetes files say nothing that the program or the repository denies."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from nanovllm.cli import serve as serve_command
from nanovllm.cli.flags import Parser
from nanovllm.server.service import ServerConfig

from .live_server import Live, request

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = ("docker-compose.yml", "docker-compose.gpu.yml")
YAML_FILES = sorted(path for path in DEPLOY.rglob("*.y*ml"))


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (FROM, "base AS gpu"), ..."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def objects() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod() -> Any:
    return objects()["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (found,) = pod["containers"]
    return found


@pytest.fixture(scope="module")
def parser() -> Parser:
    found = Parser("nanovllm serve", "")
    serve_command.add_arguments(found)
    return found


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("probe", DEPLOY / "probe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(arguments: list[str], parser: Parser) -> dict[str, Any]:
    """What a command line sets; it is refused if a flag does not exist."""
    options = parser.parse(arguments)
    assert options is not None
    return vars(options)


# --- flags and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_commands_have_flags_that_exist(parser: Parser, container: Any) -> None:
    found = dict(instructions())
    assert yaml.safe_load(found["ENTRYPOINT"]) == ["nanovllm", "serve"]
    assert values(yaml.safe_load(found["CMD"]), parser)["host"] == "0.0.0.0"
    assert values(container["args"], parser)["host"] == "0.0.0.0"
    command = read("docker-compose.yml")["services"]["server"]["command"]
    assert values(command, parser)["config"] == "/etc/nanovllm/server.yaml"


def test_configuration_files_hold_what_exists(tmp_path: Path) -> None:
    found = serve_command._read_file(str(DEPLOY / "server.yaml"))
    assert found["host"] == "0.0.0.0"
    secret = tmp_path / "server.yaml"
    secret.write_text(objects()["Secret"]["stringData"]["server.yaml"])
    assert serve_command._read_file(str(secret)) == {"api_key": ["change-me"]}
    # What is commented out can be used by taking the mark away.
    text = (DEPLOY / "server.yaml").read_text(encoding="utf-8")
    secret.write_text(text.replace("# api-key", "api-key"))
    assert serve_command._read_file(str(secret))["api_key"] == ["change-me"]


# --- the image ------------------------------------------------------------------------------------


def ignored(path: str) -> bool:
    """Whether the build context leaves the path out; the last rule that fits decides."""
    result = False
    for rule in (DEPLOY / "Dockerfile.dockerignore").read_text().split():
        pattern = rule.lstrip("!").removeprefix("**/")
        parts = path.split("/")
        starts = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
        names = parts if "**/" in rule else starts
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            result = not rule.startswith("!")
    return result


def test_the_image_copies_what_is_there() -> None:
    sources = [
        word
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for word in shlex.split(rest)[:-1]
    ]
    assert {"nanovllm", "pyproject.toml", "deploy/constraints.txt", "deploy/probe.py"} <= {*sources}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for file in ("nanovllm/server/page.html", "nanovllm/kernels/cpu/simd.h"):
        assert (ROOT / file).exists()
        assert not ignored(file), file
    left_out = ("tests/conftest.py", ".git/config", "nanovllm/__pycache__/llm.pyc", ".venv/x")
    assert all(map(ignored, left_out))


def test_the_image_installs_and_runs_what_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runs = [rest for name, rest in instructions() if name == "RUN"]
    copied = dict(shlex.split(rest)[-2:] for name, rest in instructions() if name == "COPY")
    (install,) = [run for run in runs if "/src[" in run]
    extras = re.findall(r"/src\[([\w,]+)\]", install)[0].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert copied["deploy/constraints.txt"] in install
    assert "nanovllm" in project["scripts"]
    assert project["readme"] in {word for _, rest in instructions() for word in rest.split()}
    stages = [rest.split(" AS ")[1] for name, rest in instructions() if name == "FROM"]
    assert stages[-1] == "cpu"  # what is built without --target
    targets = [read(name)["services"]["server"]["build"]["target"] for name in COMPOSE]
    assert set(targets) <= set(stages)


def needed(project: dict[str, Any], *extras: str) -> Iterator[Requirement]:
    texts = list(project["dependencies"])
    texts += [text for extra in extras for text in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, texts):
        if requirement.name == "nanovllm":
            yield from needed(project | {"dependencies": []}, *requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = {name.lower().replace("_", "-"): version for name, version in pairs}
    found = list(needed(project, "server"))
    assert len(found) >= 13
    for requirement in found:
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


# --- users, ports, volumes, times -----------------------------------------------------------------


def test_users_and_writable_places_agree(pod: Any, container: Any) -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    (created,) = [rest for name, rest in instructions() if "useradd" in rest]
    assert f"--uid {users[-1]} " in created
    context = pod["securityContext"]
    assert str(context["runAsUser"]) == str(context["fsGroup"]) == users[-1] != "0"
    home = dict(instructions())["WORKDIR"]
    compose = read("docker-compose.yml")["services"]["server"]
    places = [volume.split(":")[1] for volume in compose["volumes"]] + compose["tmpfs"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert container["securityContext"]["readOnlyRootFilesystem"] is compose["read_only"] is True
    for place in (f"{home}/.cache", "/tmp"):
        assert place in places
        assert place in mounted
    assert f"TRITON_CACHE_DIR={home}/.cache" in str(instructions())
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_ports_agree(parser: Parser, container: Any) -> None:
    port = int(dict(instructions())["EXPOSE"])
    assert ServerConfig().port == port
    assert values(container["args"], parser)["port"] == port
    assert read("server.yaml")["port"] == port
    compose = read("docker-compose.yml")["services"]
    assert compose["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert read("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"] == [
        f"server:{port}"
    ]
    assert compose["prometheus"]["ports"][0].endswith(
        ":" + read("grafana/datasource.yml")["datasources"][0]["url"].rsplit(":")[-1]
    )
    (named,) = container["ports"]
    (served,) = objects()["Service"]["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (port, named["name"])
    assert named["containerPort"] == port
    labels = objects()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects()["Service"]["spec"]["selector"].items() <= labels.items()
    (watched,) = read("servicemonitor.yaml")["spec"]["endpoints"]
    assert watched["port"] == served["name"]
    key = watched["authorization"]["credentials"]
    assert key["name"] == objects()["Secret"]["metadata"]["name"]
    assert key["key"] in objects()["Secret"]["stringData"]


def test_what_is_mounted_is_there() -> None:
    services = read("docker-compose.yml")["services"]
    named = set(read("docker-compose.yml")["volumes"])
    files = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert all((DEPLOY / file).is_file() for file in files if file.startswith("."))
    assert {file for file in files if not file.startswith(".")} == named
    rules = read("prometheus.yml")["rule_files"]
    assert [f"./{name}:/etc/prometheus/{name}:ro" for name in rules] == [
        volume for volume in services["prometheus"]["volumes"] if "alerts" in volume
    ]
    (provider,) = read("grafana/dashboards.yml")["providers"]
    assert any(provider["options"]["path"] in volume for volume in services["grafana"]["volumes"])
    assert set(read("docker-compose.gpu.yml")["services"]) <= set(services)


def test_prometheus_knows_the_job_of_the_alerts() -> None:
    jobs = re.findall(r'job="(\w+)"', (DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
    (scraped,) = read("prometheus.yml")["scrape_configs"]
    assert set(jobs) == {scraped["job_name"]} == {objects()["Service"]["metadata"]["name"]}


def test_there_is_time_to_drain(parser: Parser, pod: Any, container: Any) -> None:
    drain = values(container["args"], parser)["drain_timeout"]
    _, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= drain + float(sleep) + 10
    grace = read("docker-compose.yml")["services"]["server"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) >= read("server.yaml")["drain-timeout"] + 10


# --- probes ---------------------------------------------------------------------------------------


def test_probes_ask_for_paths_that_answer(live: Live, container: Any, probe: ModuleType) -> None:
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")}
    paths |= {container["readinessProbe"]["exec"]["command"][1]}
    paths |= {yaml.safe_load(dict(instructions())["HEALTHCHECK"].split("CMD ")[1])[1]}
    paths |= {read("prometheus.yml")["scrape_configs"][0]["metrics_path"]}
    assert paths == {"/health", "/ready", "/metrics"}
    for path in paths:
        for method in ("GET", "HEAD"):
            assert request(live.port, method, path)[0] == 200, (method, path)
    names = {rest.split()[-1] for name, rest in instructions() if name == "COPY"}
    assert f"/usr/local/bin/{container['readinessProbe']['exec']['command'][0]}" in names


def test_the_probe_tells_ready_from_not(
    start: Callable[..., Live], probe: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    live = start(server={"api_keys": ("one", "two")})
    config = tmp_path / "server.yaml"
    port = ["--port", str(live.port)]
    assert probe.main(["/health", *port]) == 0
    assert probe.main(["/ready", *port]) == 1
    assert "401" in capsys.readouterr().err
    for text in ("api-key: one", "api_key: [two]"):
        config.write_text(f"{text}\nport: {live.port}\n")
        assert probe.main(["/ready", "--config", str(config)]) == 0
    live.service.draining = True
    assert probe.main(["/ready", "--config", str(config)]) == 1
    assert "503" in capsys.readouterr().err
    assert probe.main(["/health", "--config", str(config)]) == 0
    live.service.draining = False
    assert probe.main(["/health", "--port", "9"]) == 1  # nobody listens there
    assert "no answer on port 9" in capsys.readouterr().err
