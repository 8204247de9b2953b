package cluster

import (
	"bytes"
	"encoding/binary"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// lean decodes only what is kept of an object. Four fifths of a pod on the wire are managed fields, environments, volumes and
// statuses of containers; decoding them first is most of the work of an update that changes nothing, and all of the garbage of a list.
type lean struct{ runtime.Serializer }

// Decode implements runtime.Decoder.
func (l lean) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	return l.Serializer.Decode(strip(data), defaults, into)
}

// leanCodecs is a codec factory whose protobuf decoders are lean.
type leanCodecs struct{ runtime.NegotiatedSerializer }

// SupportedMediaTypes implements runtime.NegotiatedSerializer.
func (c leanCodecs) SupportedMediaTypes() []runtime.SerializerInfo {
	infos := slices.Clone(c.NegotiatedSerializer.SupportedMediaTypes())
	for i := range infos {
		if infos[i].MediaType == runtime.ContentTypeProtobuf {
			infos[i].Serializer = lean{infos[i].Serializer}
		}
	}
	return infos
}

// fields are the numbers of a message's fields that are kept; one that is a message may be kept in parts.
type fields map[uint64]fields

// The numbers are those of generated.proto in k8s.io/api/core/v1, k8s.io/api/networking/v1 and k8s.io/apimachinery/pkg/apis/meta/v1.
// What convert.go reads must be among them, and what client-go does: resource versions, and the annotation of the bookmark.
var (
	whole fields

	metaFields = fields{
		1: whole, 3: whole, 5: whole, 6: whole, // name, namespace, uid, resourceVersion
		8: whole, 9: whole, 11: whole, 12: whole, // creationTimestamp, deletionTimestamp, labels, annotations
	}
	containerFields = fields{6: whole, 24: whole} // ports, restartPolicy
	podFields       = fields{
		1: metaFields,
		2: fields{2: containerFields, 10: whole, 11: whole, 20: containerFields}, // containers, nodeName, hostNetwork, initContainers
		3: fields{1: whole, 6: whole, 12: whole},                                 // phase, podIP, podIPs
	}
	kindFields = map[string]fields{
		"Pod": podFields, "PodList": listFields(podFields),
		"Namespace": {1: metaFields}, "NamespaceList": listFields(fields{1: metaFields}),
		"NetworkPolicy": {1: metaFields, 2: whole}, "NetworkPolicyList": listFields(fields{1: metaFields, 2: whole}),
	}
)

// listFields are those of a list: its metadata and its items.
func listFields(item fields) fields { return fields{1: whole, 2: item} }

// envelopePrefix begins every object in application/vnd.kubernetes.protobuf; a runtime.Unknown follows.
var envelopePrefix = []byte("k8s\x00")

// strip takes out of an encoded object what is not kept. What it does not understand it returns as it is, for the decoder to judge.
func strip(data []byte) []byte {
	message, ok := bytes.CutPrefix(data, envelopePrefix)
	if !ok {
		return data
	}
	keep := kindFields[string(lastField(lastField(message, 1), 2))] // typeMeta.kind
	if keep == nil {
		return data
	}
	envelope := fields{1: whole, 2: keep, 3: whole, 4: whole} // typeMeta, raw, contentEncoding, contentType
	out, ok := envelope.strip(append(make([]byte, 0, 1024), envelopePrefix...), message)
	if !ok {
		return data
	}
	return out
}

// Wire types of protobuf (https://protobuf.dev/programming-guides/encoding). Groups are not used by Kubernetes.
const (
	wireVarint = 0
	wireI64    = 1
	wireLen    = 2
	wireI32    = 5
)

// lengthBytes is the size of a length whose value is not known when its place is taken: a varint need not be the shortest.
const lengthBytes = 5

// strip appends the kept fields of a message to dst.
func (keep fields) strip(dst, message []byte) ([]byte, bool) {
	for len(message) > 0 {
		f, ok := nextField(message)
		if !ok {
			return nil, false
		}
		parts, kept := keep[f.number]
		switch {
		case !kept:
		case parts == nil || f.wire != wireLen:
			dst = append(dst, message[:f.size]...)
		default:
			dst = binary.AppendUvarint(dst, f.number<<3|wireLen)
			at := len(dst) + lengthBytes
			if dst, ok = parts.strip(append(dst, make([]byte, lengthBytes)...), f.value); !ok {
				return nil, false
			}
			n := len(dst) - at
			for i := range lengthBytes {
				dst[at-lengthBytes+i] = byte(n>>(7*i)) | 0x80 //nolint:gosec // the low bits are meant
			}
			dst[at-1] &^= 0x80
		}
		message = message[f.size:]
	}
	return dst, true
}

// field is the first one of a message: size bytes in all, of which value are its own if it is length-delimited.
type field struct {
	number, wire uint64
	size         int
	value        []byte
}

func nextField(message []byte) (field, bool) {
	key, n := binary.Uvarint(message)
	if n <= 0 {
		return field{}, false
	}
	f := field{number: key >> 3, wire: key & 7, size: n}
	rest := message[n:]
	switch f.wire {
	case wireVarint:
		_, n := binary.Uvarint(rest)
		if n <= 0 {
			return field{}, false
		}
		f.size += n
	case wireI64:
		f.size += 8
	case wireI32:
		f.size += 4
	case wireLen:
		length, n := binary.Uvarint(rest)
		if n <= 0 || length > uint64(len(rest)-n) {
			return field{}, false
		}
		f.value = rest[n : n+int(length)] //nolint:gosec // not more than there is
		f.size += n + len(f.value)
	default:
		return field{}, false
	}
	return f, f.size <= len(message)
}

// lastField returns the value of a length-delimited field; of several, the last one counts, as in every decoder.
func lastField(message []byte, number uint64) []byte {
	var value []byte
	for len(message) > 0 {
		f, ok := nextField(message)
		if !ok {
			return nil
		}
		if f.number == number && f.wire == wireLen {
			value = f.value
		}
		message = message[f.size:]
	}
	return value
}
