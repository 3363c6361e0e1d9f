"""A client of the gRPC API in plain Python: compiles the protos, submits a run, and watches it.

    python face_peer.py PROTO_FOLDER HOST:PORT SPEC_TOML [KEY=VALUE ...] [TOKEN_FILE]

Needs grpcio and grpcio-tools, and nothing of Lacuna but its protos: the coordinator reads the
specification and looks at the data. Prints a JSON object a line: the created run, each update, the
end. Watching goes on where it was when the coordinator comes back.
"""

import importlib
import json
import pathlib
import sys
import tempfile
import time

import grpc
from google.protobuf import json_format
from grpc_tools import protoc

CALL_SECONDS = 20
WATCH_SECONDS = 240
RETRY_SECONDS = 0.5


def compiled(protos):
    """Compiles the protos into a temporary folder; returns the modules of runs."""
    out = tempfile.mkdtemp(prefix="lacuna-protos-")
    files = sorted(str(path) for path in pathlib.Path(protos).rglob("*.proto"))
    own = pathlib.Path(protoc.__file__).parent / "_proto"
    words = ["protoc", f"-I{protos}", f"-I{own}", f"--python_out={out}",
             f"--grpc_python_out={out}", *files]
    if protoc.main(words) != 0:
        raise SystemExit("the protos do not compile")
    sys.path.insert(0, out)
    return (importlib.import_module("lacuna.v1.run_pb2"),
            importlib.import_module("lacuna.v1.run_pb2_grpc"))


def show(message):
    """Prints a message as one line of JSON."""
    print(json.dumps(json_format.MessageToDict(message, preserving_proto_field_name=True)),
          flush=True)


class Client:
    """Calls of runs, with the token of each; what may be tried again is, until a deadline."""

    def __init__(self, channel, runs, stubs, token):
        self.runs = runs
        self.service = stubs.RunServiceStub(channel)
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    def call(self, method, request):
        """Makes a call with a deadline."""
        return getattr(self.service, method)(request, timeout=CALL_SECONDS, metadata=self.metadata)

    def submit(self, toml, settings):
        """Creates the run of a specification in TOML, or finds it; returns the answer."""
        wanted = self.runs.ValidateRunRequest(spec=toml, overrides=settings)
        found = self.call("ValidateRun", wanted)
        if found.problems:
            raise SystemExit("\n".join(
                f"{p.file}:{p.line}:{p.column}: {p.message} {p.fix}" for p in found.problems))
        # Without a size and a fingerprint the coordinator looks at the data itself.
        return self.call("CreateRun",
                         self.runs.CreateRunRequest(spec=found.effective, resume=True))

    def watch(self, run_id):
        """Yields a run's updates until it is at rest, each once, over restarts of the service."""
        seen, until = 0, time.monotonic() + WATCH_SECONDS
        while True:
            request = self.runs.WatchRunRequest(run_id=run_id, after_seq=seen)
            try:
                for update in self.service.WatchRun(request, timeout=until - time.monotonic(),
                                                    metadata=self.metadata):
                    yield update
                    seen = max(seen, update.seq)
                    kind = update.WhichOneof("update")
                    if kind == "snapshot" and update.snapshot.HasField("exit_code"):
                        return
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
                print(f"watching again: {error.details()}", file=sys.stderr, flush=True)
                time.sleep(RETRY_SECONDS)


def main():
    protos, address, spec_file, *more = sys.argv[1:]
    settings = [word for word in more if "=" in word]
    tokens = [pathlib.Path(word).read_text().strip() for word in more if "=" not in word]
    runs, stubs = compiled(protos)
    with grpc.insecure_channel(address) as channel:
        client = Client(channel, runs, stubs, tokens[0] if tokens else None)
        created = client.submit(pathlib.Path(spec_file).read_text(), settings)
        show(created)
        for update in client.watch(created.run.run_id):
            show(update)


if __name__ == "__main__":
    main()
