// Copy what the page needs into one folder of static files:
//
//   node browser/collect.mjs FOLDER SITE
//
// FOLDER is what `h1export build --target ort --graph wasm --layout transformers.js --out FOLDER` made. SITE can then be
// served by any server of files, such as `python3 -m http.server --directory SITE`. The page asks for nothing else.
import { cpSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { argv } from "node:process";
import { fileURLToPath } from "node:url";

const [folder, site] = argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const packages = join(here, "..", "node_modules");
const runtime = join(packages, "onnxruntime-web", "dist");
mkdirSync(join(site, "lib"), { recursive: true });
for (const name of ["index.html", "page.js"]) cpSync(join(here, name), join(site, name));
cpSync(join(packages, "@huggingface", "transformers", "dist", "transformers.min.js"), join(site, "lib", "transformers.min.js"));
// the second of the two builds has WebGPU, and is larger and slower without it
for (const build of ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"])
  for (const ending of ["mjs", "wasm"]) cpSync(join(runtime, `${build}.${ending}`), join(site, "lib", `${build}.${ending}`));
cpSync(folder, join(site, "model"), { recursive: true });
