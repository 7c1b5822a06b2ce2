"""What every test runs under: one thread, no network, figures that need no display, reproducible random draws."""
import ipaddress
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
os.environ.update({
    # Two workers on two cores: one thread each, or they fight. Read when numpy and torch are imported.
    'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false',
    # plotly_mimetype: without it 4.8 MB of plotly.js land in a notebook's output.
    'MPLBACKEND': 'agg', 'PLOTLY_RENDERER': 'plotly_mimetype',
    # Programs that tests start are told too that there is no network.
    'HF_HUB_OFFLINE': '1', 'PIP_NO_INDEX': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'})

# `ci` draws the same examples in every run; `HYPOTHESIS_PROFILE=check` looks for new ones. No deadline: the first call
# of an operation may take a second.
CALM = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('ci', derandomize=True, max_examples=50, **CALM)
settings.register_profile('check', max_examples=500, print_blob=True, **CALM)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))


# No network: a connection that leaves this machine fails, and so does the test that tried, whoever caught the error.

ATTEMPTS: list[str] = []

def is_local(family: int, address: object) -> bool:
    "Does a socket address stay on this machine? Unix sockets, loopback addresses and `localhost` do."
    if family not in (socket.AF_INET, socket.AF_INET6): return True
    host = str(address[0])
    if host in ('', 'localhost'): return True
    try: return ipaddress.ip_address(host.partition('%')[0]).is_loopback
    except ValueError: return False

def guarded(connect):
    def only_local(self: socket.socket, address: object, *rest):
        # connect of a UDP socket sends nothing; libraries use it to learn the machine's own address
        if self.type & socket.SOCK_STREAM and not is_local(self.family, address):
            ATTEMPTS.append(str(address))
            raise OSError(f'tests have no network: connection to {address}')
        return connect(self, address, *rest)
    return only_local

def guarded_lookup(getaddrinfo):
    def only_local(host, *rest, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, '', 'localhost', socket.gethostname()) and not re.fullmatch(r'[0-9.]+|.*:.*', name):
            ATTEMPTS.append(name)
            raise socket.gaierror(socket.EAI_NONAME, f'tests have no network: {name}')
        return getaddrinfo(host, *rest, **kwargs)
    return only_local

@pytest.fixture(autouse=True, scope='session')
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ('connect', 'connect_ex'): patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, 'getaddrinfo', guarded_lookup(socket.getaddrinfo))
        yield

@pytest.fixture(autouse=True)
def _no_attempt() -> Iterator[None]:
    ATTEMPTS.clear()
    yield
    assert not ATTEMPTS, f'the test tried to reach the network: {ATTEMPTS}'


# The project, and copies of it

def project_files() -> list[Path]:
    "Files of the project, relative to its root: tracked ones, and new ones that git does not ignore."
    done = subprocess.run(['git', '-c', 'safe.directory=*', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    if done.returncode: pytest.skip(f'needs the git working tree: {done.stderr.strip()}')
    return sorted(Path(p) for p in set(done.stdout.split('\0')) if p and (ROOT/p).is_file())

@pytest.fixture(scope='session')
def files() -> list[Path]:
    "Files of the project, relative to its root."
    return project_files()

def copy_project(to: Path) -> Path:
    "A clean copy of the project in the folder `to`, without anything that was built."
    for path in project_files():
        (to/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/path, to/path)
    return to

@pytest.fixture(scope='module')
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A clean copy of the project for the tests of one module, which may write into it."
    return copy_project(tmp_path_factory.mktemp('copy'))

def alone(copy: Path) -> dict[str, str]:
    "Environment in which Python imports the package from `copy` and not from where it is installed."
    return os.environ | {'PYTHONPATH': str(copy)}
