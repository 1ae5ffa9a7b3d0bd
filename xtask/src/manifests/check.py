"""Validates manifests against the schemas of Kubernetes: unknown fields and wrong types are errors.

Arguments: a folder, and releases of Kubernetes. Prints each error with its location, and exits with 1 if there is
one. Fields of kustomize files and kinds that are not part of Kubernetes are listed here by name.
"""

import pathlib
import sys

import kubernetes_validate
import yaml

CUSTOM_KINDS = {
    "kustomize.config.k8s.io/v1beta1": {
        "Kustomization": {
            "apiVersion", "kind", "namespace", "resources", "configMapGenerator", "labels", "images"
        }
    },
    "kustomize.config.k8s.io/v1alpha1": {"Component": {"apiVersion", "kind", "resources", "patches"}},
    "monitoring.coreos.com/v1": {"PodMonitor": {"apiVersion", "kind", "metadata", "spec"}},
}

folder, releases = pathlib.Path(sys.argv[1]), sys.argv[2:]
faults, validated, named, generators, mounted = [], 0, set(), set(), set()
for file in sorted(folder.rglob("*.yaml")):
    manifest = yaml.safe_load(file.read_text())
    place = file.relative_to(folder)
    others = CUSTOM_KINDS.get(manifest["apiVersion"])
    if others:
        known = others.get(manifest["kind"], set())
        faults += [f"{place}: {key}: unknown" for key in manifest if key not in known]
        generated = manifest.get("configMapGenerator", [])
        names = manifest.get("resources", []) + [name for one in generated for name in one["files"]]
        named |= {(file.parent / name).resolve() for name in names}
        generators |= {one["name"] for one in generated}
        continue
    if manifest["kind"] == "DaemonSet":
        volumes = manifest["spec"]["template"]["spec"]["volumes"]
        mounted |= {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    for release in releases:
        validated += 1
        try:
            kubernetes_validate.validate(manifest, release, strict=True)
        except kubernetes_validate.ValidationError as fault:
            where = ".".join(map(str, fault.path))
            faults.append(f"{place}: {where}: {fault.message} (Kubernetes {release})")
        except kubernetes_validate.SchemaNotFoundError as fault:
            faults.append(f"{place}: {fault.message}")
for file in folder.rglob("*.yaml"):
    if file.name != "kustomization.yaml" and file.resolve() not in named:
        faults.append(f"{file.relative_to(folder)}: not listed in any kustomization.yaml")
faults += [f"{file}: does not exist" for file in named if not file.exists()]
faults += [f"ConfigMap {name}: must be both generated and mounted" for name in generators ^ mounted]
print(*faults, sep="\n")
sys.exit(1 if faults or not validated else 0)
