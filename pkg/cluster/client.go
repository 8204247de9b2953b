package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// The resources that podwall reads.
const (
	namespaces      = "namespaces"
	pods            = "pods"
	networkPolicies = "networkpolicies"
)

// Client lists and watches resources in all namespaces.
type Client interface {
	List(ctx context.Context, resource string, opts metav1.ListOptions) (runtime.Object, error)
	Watch(ctx context.Context, resource string, opts metav1.ListOptions) (watch.Interface, error)
}

// RESTClient is the Client of an API server. It is no clientset: that one brings the types of all API groups into the process, ten
// times of what is used.
type RESTClient struct{ core, networking *rest.RESTClient }

var _ Client = (*RESTClient)(nil)

// NewRESTClient returns a client for the cluster that the kubeconfig file names, or for the one around this pod when kubeconfig is
// empty.
func NewRESTClient(kubeconfig string) (*RESTClient, error) {
	config, err := restConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), networkingv1.AddToScheme(scheme)); err != nil {
		return nil, fmt.Errorf("register API types: %w", err)
	}
	config.UserAgent = "podwalld"
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.ContentType = runtime.ContentTypeProtobuf
	config.NegotiatedSerializer = leanCodecs{serializer.NewCodecFactory(scheme).WithoutConversion()}
	// Three lists and three watches are all there is; the burst lets them start at once after an API server's restart.
	config.QPS, config.Burst = 10, 20
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper { return impatient{rt, answerTimeout} })
	// One HTTP client, so one connection.
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("create API client for %s: %w", config.Host, err)
	}
	group := func(path string, gv schema.GroupVersion) (*rest.RESTClient, error) {
		c := *config
		c.APIPath, c.GroupVersion = path, &gv
		return rest.RESTClientForConfigAndClient(&c, httpClient)
	}
	core, err := group("/api", corev1.SchemeGroupVersion)
	networking, errN := group("/apis", networkingv1.SchemeGroupVersion)
	if err := errors.Join(err, errN); err != nil {
		return nil, fmt.Errorf("create API client for %s: %w", config.Host, err)
	}
	return &RESTClient{core, networking}, nil
}

func (c *RESTClient) get(resource string, opts *metav1.ListOptions) *rest.Request {
	group := c.core
	if resource == networkPolicies {
		group = c.networking
	}
	return group.Get().Resource(resource).VersionedParams(opts, metav1.ParameterCodec)
}

// List implements Client.
func (c *RESTClient) List(ctx context.Context, resource string, opts metav1.ListOptions) (runtime.Object, error) {
	return c.get(resource, &opts).Do(ctx).Get()
}

// Watch implements Client.
func (c *RESTClient) Watch(ctx context.Context, resource string, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	return c.get(resource, &opts).Watch(ctx)
}

// answerTimeout is how long an API server may take to begin its answer: it ends requests that are no watches after a minute itself,
// and begins the answer to a watch at once. Behind some load balancers a server that has gone is a connection that says nothing.
const answerTimeout = 70 * time.Second

// impatient gives up requests whose answer has not begun in time. What is begun may take forever, as a watch does.
type impatient struct {
	http.RoundTripper
	timeout time.Duration
}

// RoundTrip implements http.RoundTripper.
func (i impatient) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	timer := time.AfterFunc(i.timeout, func() {
		cancel(fmt.Errorf("no answer from %s within %s; look whether the API server, or a proxy before it, hangs", r.URL.Host, i.timeout))
	})
	resp, err := i.RoundTripper.RoundTrip(r.WithContext(ctx))
	if !timer.Stop() && err == nil { // too late
		err = errors.Join(context.Cause(ctx), resp.Body.Close())
		resp = nil
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && r.Context().Err() == nil {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &cancelBody{resp.Body, cancel}
	return resp, nil
}

// cancelBody releases a request's context with its answer.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

// Close implements io.Closer.
func (b *cancelBody) Close() error {
	defer b.cancel(nil)
	return b.ReadCloser.Close()
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("read --kubeconfig %s: %w", kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("find API server: not in a cluster; give --kubeconfig FILE or --manifests DIR")
	}
	if err != nil {
		return nil, fmt.Errorf("read in-cluster configuration: %w", err)
	}
	return config, nil
}
