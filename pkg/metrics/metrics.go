// Package metrics holds the daemon's Prometheus collectors in one struct that is injected.
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Metrics are all collectors, registered on a registry of their own.
type Metrics struct {
	Registry *prometheus.Registry

	Attachments   *prometheus.GaugeVec   // by state: enforced, unenforceable, quarantined, detached
	AdoptedPods   prometheus.Gauge       // pods of this node that never passed through the plugin
	Problems      prometheus.Gauge       // objects that cannot be used as written, or that the kernel refuses
	Objects       *prometheus.CounterVec // changes by kind
	Commits       *prometheus.CounterVec // by result: ok, error
	Drift         prometheus.Counter     // times that somebody else had changed the tables
	HiddenBridges prometheus.Counter     // times that somebody had hidden a bridge's traffic from netfilter
	CommitSeconds prometheus.Histogram
	RenderSeconds prometheus.Histogram
	Revoked       prometheus.Counter // connections ended because policies no longer allow them
	RevokeSeconds prometheus.Histogram
	Synced        prometheus.Gauge

	DeniedLogged prometheus.Counter // packets that denying rules told of
	DeniedLost   prometheus.Counter // packets of which the kernel could not tell, because the daemon was too slow
	LogUnbound   prometheus.Counter // times that reading them failed and began anew
}

// New registers the collectors and the Go runtime's. sourceProblems counts what is wrong with the source of objects.
func New(sourceProblems func() float64) *Metrics {
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		Attachments: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "podwall_attachments", Help: "CNI attachments registered on this node by state.",
		}, []string{"state"}),
		AdoptedPods: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "podwall_adopted_pods", Help: "Pods of this node enforced by their IPs only, because they never passed through the plugin.",
		}),
		Problems: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "podwall_problems", Help: "Objects or parts of objects that cannot be used as written, or that the kernel refuses; each is named in the log.",
		}),
		Objects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "podwall_object_changes_total", Help: "Changes of cluster objects seen, by kind.",
		}, []string{"kind"}),
		Commits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "podwall_commits_total", Help: "Transactions sent to the kernel by result.",
		}, []string{"result"}),
		Drift: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_drift_total", Help: "Times that the kernel's tables were not as loaded, because somebody else had changed them; they were restored.",
		}),
		HiddenBridges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_hidden_bridges_total", Help: "Times that the traffic inside a bridge with pods was hidden from netfilter, because somebody had switched nf_call off; it was switched on.",
		}),
		CommitSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "podwall_commit_seconds", Help: "Time of one kernel transaction.", Buckets: prometheus.ExponentialBuckets(0.0001, 2, 15),
		}),
		RenderSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "podwall_render_seconds", Help: "Time to compute the desired ruleset and its difference.", Buckets: prometheus.ExponentialBuckets(0.0001, 2, 15),
		}),
		Revoked: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_revoked_connections_total", Help: "Established connections that were ended because a change no longer allows them.",
		}),
		RevokeSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "podwall_revoke_seconds", Help: "Time to find and end the connections that a change no longer allows.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 15),
		}),
		DeniedLogged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_denied_logged_total", Help: "Denied packets that podwalld denials was told of: at most 10 a second per pod and direction; rules count all.",
		}),
		DeniedLost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_denied_lost_total", Help: "Denied packets that were logged and did not reach the daemon, because it did not read fast enough.",
		}),
		LogUnbound: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podwall_denied_unbound_total", Help: "Times that the daemon lost the NFLOG group of denied packets, and bound it again.",
		}),
		Synced: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "podwall_synced", Help: "1 once all objects have been read and the ruleset is in the kernel.",
		}),
	}
	m.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "podwall_source_problems", Help: "Manifest files or documents that cannot be read as they are; each is named in the log.",
	}, sourceProblems))
	m.Registry.MustRegister(m.Attachments, m.AdoptedPods, m.Problems, m.Objects, m.Commits, m.Drift, m.HiddenBridges, m.CommitSeconds, m.RenderSeconds, m.Revoked, m.RevokeSeconds, m.Synced,
		m.DeniedLogged, m.DeniedLost, m.LogUnbound,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}
