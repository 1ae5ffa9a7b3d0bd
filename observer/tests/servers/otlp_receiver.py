"""Receives OTLP requests over gRPC (grpcio) or HTTP and prints each as a line of JSON: its headers, and its content
decoded by OpenTelemetry's own classes. Status codes for the first requests can be given as arguments.

Arguments: grpc or http, a port or 0, a file with certificate and key for TLS, and status codes. Prints its port first.
"""

import base64
import gzip
import json
import ssl
import sys
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from google.protobuf import any_pb2, duration_pb2, json_format
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as traces_service

PROTOCOL, PORT, *TLS = sys.argv[1:3] + [argument for argument in sys.argv[3:] if argument.endswith(".pem")]
# `503=1`: this status, with a request to retry after a second; without a number, there is no retry delay. `partial=2`: accepted
# but for two spans or data points.
ANSWERS = [argument.partition("=")[::2] for argument in sys.argv[3:] if not argument.endswith(".pem")]


def show(headers, request):
    line = json.dumps({"headers": headers, "request": readable(json_format.MessageToDict(request))})
    # A single write, because several threads print.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def readable(value):
    """Replaces base64 ids with hexadecimal ones."""
    if isinstance(value, list):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {key: base64.b64decode(item).hex() if key in IDS else readable(item) for key, item in value.items()}
    return value


IDS = {"traceId", "spanId", "parentSpanId"}


def reject_part(answer, count):
    for field in ("rejected_spans", "rejected_data_points"):
        if hasattr(answer.partial_success, field):
            setattr(answer.partial_success, field, int(count))
    answer.partial_success.error_message = "not these"


def take(request, answer, context):
    code, delay = ANSWERS.pop(0) if ANSWERS else (None, None)
    if code == "partial":
        reject_part(answer, delay)
    elif code:
        status = status_pb2.Status(code=int(code), message="not now")
        if delay:
            info = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=int(delay)))
            detail = any_pb2.Any()
            detail.Pack(info)
            status.details.append(detail)
        context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
        codes = {code.value[0]: code for code in grpc.StatusCode}
        context.abort(codes[int(code)], "not now")
    show({key: value for key, value in context.invocation_metadata() if isinstance(value, str)}, request)
    return answer


class Metrics(metrics_service.MetricsServiceServicer):
    def Export(self, request, context):
        return take(request, metrics.ExportMetricsServiceResponse(), context)


class Traces(traces_service.TraceServiceServicer):
    def Export(self, request, context):
        return take(request, traces.ExportTraceServiceResponse(), context)


SIGNALS = {
    "/v1/metrics": (metrics.ExportMetricsServiceRequest, metrics.ExportMetricsServiceResponse),
    "/v1/traces": (traces.ExportTraceServiceRequest, traces.ExportTraceServiceResponse),
}


class Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        code, delay = ANSWERS.pop(0) if ANSWERS else (None, None)
        if code and code != "partial":
            self.send_response(int(code))
            if delay:
                self.send_header("retry-after", delay)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if self.path not in SIGNALS:
            self.send_error(404)
            return
        if self.headers["content-encoding"] == "gzip":
            body = gzip.decompress(body)
        request, response = SIGNALS[self.path]
        show({key.lower(): value for key, value in self.headers.items()}, request.FromString(body))
        answer = response()
        if code == "partial":
            reject_part(answer, delay)
        answer = answer.SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


if PROTOCOL == "grpc":
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    metrics_service.add_MetricsServiceServicer_to_server(Metrics(), server)
    traces_service.add_TraceServiceServicer_to_server(Traces(), server)
    if TLS:
        pem = open(TLS[0], "rb").read()
        port = server.add_secure_port(f"127.0.0.1:{PORT}", grpc.ssl_server_credentials([(pem, pem)]))
    else:
        port = server.add_insecure_port(f"127.0.0.1:{PORT}")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()
else:
    server = ThreadingHTTPServer(("127.0.0.1", int(PORT)), Http)
    if TLS:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_address[1], flush=True)
    server.serve_forever()
