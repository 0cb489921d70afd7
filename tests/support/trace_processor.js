// Runs Perfetto's trace processor, which is a worker of its user interface, outside a browser:
// node trace_processor.js FOLDER, requests on standard input, replies on standard output.
const fs = require('node:fs'), path = require('node:path'), vm = require('node:vm');

const folder = process.argv[2];

// It fetches its WebAssembly by a synchronous request.
class XMLHttpRequest {
  open(method, name) { this.name = name; }
  send() { this.response = new Uint8Array(fs.readFileSync(path.join(folder, path.basename(this.name)))).buffer; }
}

// What a browser's worker has; not `process`, by which it would know Node and refuse.
const worker = {
  XMLHttpRequest, URL, TextDecoder, TextEncoder, setTimeout, clearTimeout, performance, crypto,
  console: {log() {}, warn() {}, error() {}}, location: {href: 'file:///'}, WorkerGlobalScope() {},
};
worker.self = worker;
const context = vm.createContext(worker);
vm.runInContext(fs.readFileSync(path.join(folder, 'engine_bundle.js'), 'utf8'), context);
vm.runInContext('var copy = (bytes) => new Uint8Array(bytes)', context);  // of the worker's own kind

const port = {postMessage: (reply) => process.stdout.write(Buffer.from(reply))};
worker.onmessage({data: port});
setTimeout(() => port.onmessage({data: context.copy(fs.readFileSync(0))}));  // once it is initialized
