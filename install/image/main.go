// Command image packs files into an OCI image archive, without Docker: `ctr images import`, `podman load` and `skopeo` read it.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(0)
		}
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// list is a repeatable flag.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run(args []string) error {
	fs := flag.NewFlagSet("image", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "Usage: image -o OUT.tar -name NAME:TAG [flags] PATH-IN-IMAGE=FILE...")
		fs.PrintDefaults()
	}
	var img image
	var entrypoint, cmd, labels list
	out := fs.String("o", "", "archive to write")
	name := fs.String("name", "", "`NAME:TAG` of the image")
	fs.StringVar(&img.arch, "arch", runtime.GOARCH, "architecture of the files")
	fs.StringVar(&img.user, "user", "", "`UID:GID` to run as")
	fs.Var(&entrypoint, "entrypoint", "entrypoint, one flag per word")
	fs.Var(&cmd, "cmd", "default arguments, one flag per word")
	fs.Var(&labels, "label", "`KEY=VALUE`, repeatable")
	if err := fs.Parse(args); err != nil {
		return err
	}
	repository, tag, ok := cutTag(*name)
	if !ok || *out == "" || fs.NArg() == 0 {
		return errors.New("want -o OUT.tar -name NAME:TAG and at least one PATH-IN-IMAGE=FILE")
	}
	img.name, img.tag = repository+":"+tag, tag
	img.entrypoint, img.cmd, img.labels = entrypoint, cmd, map[string]string{}
	for _, l := range labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("-label %q: want KEY=VALUE", l)
		}
		img.labels[k] = v
	}
	for _, arg := range fs.Args() {
		dst, src, ok := strings.Cut(arg, "=")
		if !ok || !path.IsAbs(dst) {
			return fmt.Errorf("%q: want /PATH/IN/IMAGE=FILE", arg)
		}
		data, err := os.ReadFile(src)
		if err != nil {
			return err
		}
		info, err := os.Stat(src)
		if err != nil {
			return err
		}
		img.files = append(img.files, file{path: strings.TrimPrefix(path.Clean(dst), "/"), data: data, mode: int64(info.Mode().Perm())})
	}
	archive, err := img.archive()
	if err != nil {
		return err
	}
	// By rename: whoever reads the archive while it is built again reads the old one.
	if err := os.WriteFile(*out+".new", archive, 0o644); err != nil { //nolint:gosec // an image is for everybody
		return err
	}
	return os.Rename(*out+".new", *out)
}

// cutTag splits NAME:TAG; a colon before a slash belongs to a registry's port.
func cutTag(name string) (string, string, bool) {
	i := strings.LastIndexByte(name, ':')
	if i <= 0 || i < strings.LastIndexByte(name, '/') || i == len(name)-1 {
		return "", "", false
	}
	return name[:i], name[i+1:], true
}

type file struct {
	path string
	data []byte
	mode int64
}

// image is a one-layer image. Equal content gives an equal archive: nothing in it depends on the time.
type image struct {
	name, tag, arch, user string
	entrypoint, cmd       []string
	labels                map[string]string
	files                 []file
}

// Media types of the OCI image specification.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

type object = map[string]any

func (img *image) archive() ([]byte, error) {
	layer, err := img.layer()
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	if _, err := zip.Write(layer); err != nil {
		return nil, err
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	process := object{}
	for key, value := range map[string][]string{"Entrypoint": img.entrypoint, "Cmd": img.cmd} {
		if len(value) > 0 {
			process[key] = value
		}
	}
	if img.user != "" {
		process["User"] = img.user
	}
	if len(img.labels) > 0 {
		process["Labels"] = img.labels
	}
	config, err := json.Marshal(object{
		"architecture": img.arch, "os": "linux", "config": process,
		"rootfs": object{"type": "layers", "diff_ids": []string{digest(layer)}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(object{
		"schemaVersion": 2, "mediaType": typeManifest,
		"config": descriptor(typeConfig, config), "layers": []object{descriptor(typeLayer, packed.Bytes())},
	})
	if err != nil {
		return nil, err
	}
	top := descriptor(typeManifest, manifest)
	top["platform"] = object{"architecture": img.arch, "os": "linux"}
	// The first annotation is what containerd names the image by, the second what other tools do.
	top["annotations"] = object{"io.containerd.image.name": img.name, "org.opencontainers.image.ref.name": img.tag}
	index, err := json.Marshal(object{"schemaVersion": 2, "mediaType": typeIndex, "manifests": []object{top}})
	if err != nil {
		return nil, err
	}
	files := []file{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644}, {"index.json", index, 0o644}}
	for _, blob := range [][]byte{config, manifest, packed.Bytes()} {
		files = append(files, file{"blobs/" + strings.Replace(digest(blob), ":", "/", 1), blob, 0o644})
	}
	var buf bytes.Buffer
	err = writeTar(&buf, nil, files)
	return buf.Bytes(), err
}

// layer is the root filesystem: the files, the directories above them and the empty ones that runtimes mount on.
func (img *image) layer() ([]byte, error) {
	dirs := map[string]bool{"dev": true, "etc": true, "proc": true, "run": true, "sys": true, "tmp": true}
	for _, f := range img.files {
		for d := path.Dir(f.path); d != "."; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	var buf bytes.Buffer
	if err := writeTar(&buf, slices.Sorted(maps.Keys(dirs)), img.files); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func writeTar(w io.Writer, dirs []string, files []file) error {
	t := tar.NewWriter(w)
	for _, d := range dirs {
		mode := int64(0o755)
		if d == "tmp" {
			mode = 0o1777
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: mode}); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.path, Mode: f.mode, Size: int64(len(f.data))}); err != nil {
			return err
		}
		if _, err := t.Write(f.data); err != nil {
			return err
		}
	}
	return t.Close()
}

func descriptor(mediaType string, blob []byte) object {
	return object{"mediaType": mediaType, "digest": digest(blob), "size": len(blob)}
}

func digest(blob []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(blob)) }
