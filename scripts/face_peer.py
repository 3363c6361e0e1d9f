"""A client of the gRPC API in plain Python: compiles the protos, submits a run, and watches it.

    python face_peer.py PROTO_FOLDER HOST:PORT SPEC_JSON N_SAMPLES FINGERPRINT [TOKEN_FILE]

Needs grpcio and grpcio-tools. Prints a JSON object a line: the created run, each update, the end.
"""

import importlib
import json
import pathlib
import sys
import tempfile

import grpc
from google.protobuf import json_format
from grpc_tools import protoc

CALL_SECONDS = 20
WATCH_SECONDS = 240


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


def main():
    protos, address, spec_file, n_samples, fingerprint, *token_file = sys.argv[1:]
    runs, stubs = compiled(protos)
    metadata = []
    if token_file:
        token = pathlib.Path(token_file[0]).read_text().strip()
        metadata.append(("authorization", f"Bearer {token}"))
    with grpc.insecure_channel(address) as channel:
        service = stubs.RunServiceStub(channel)
        request = runs.CreateRunRequest(
            spec=pathlib.Path(spec_file).read_text(), resume=True, n_samples=int(n_samples),
            fingerprint=fingerprint)
        created = service.CreateRun(request, timeout=CALL_SECONDS, metadata=metadata)
        show(created)
        watch = runs.WatchRunRequest(run_id=created.run.run_id, after_seq=0)
        for update in service.WatchRun(watch, timeout=WATCH_SECONDS, metadata=metadata):
            show(update)
            if update.WhichOneof("update") == "snapshot" and update.snapshot.HasField("exit_code"):
                break


if __name__ == "__main__":
    main()
