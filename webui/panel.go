package webui

// The path of a browser to the daemon:
//
//	connection on a LAN interface ─▶ TLS, or a redirect to it ─▶ Host one of ours? same
//	origin? ─▶ session or token ─▶ the API that the socket has as well (api.go)
//
// The listeners are bound to interfaces, not to addresses: who comes by an uplink is never
// answered, and a new address of the LAN needs nothing.

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gin-gonic/gin"
	"go.etcd.io/bbolt"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

const (
	// cookieName has the prefix with which browsers take a cookie over HTTPS alone, and
	// of this host alone (RFC 6265bis).
	cookieName = "__Host-sheaf"
	// maxConnections bounds what one interface's clients may hold open.
	maxConnections = 256
	// listenRetry is how long after a failure, and how often, listeners are looked at.
	listenRetry = 2 * time.Second
	// certificateLife is that of the device's own certificate: nobody renews it.
	certificateLife = 20 * 365 * 24 * time.Hour

	identityKey = "sheaf.identity"
)

// socketIdentity is whoever can open the socket: the administrator.
var socketIdentity = Identity{Name: "socket", Write: true}

// identity is who makes a request.
func identity(ctx context.Context) Identity {
	if c, ok := ctx.(*gin.Context); ok {
		if who, ok := c.Get(identityKey); ok {
			return who.(Identity)
		}
	}
	return Identity{}
}

// guard lets nobody behind it who may not come.
type guard struct {
	access *Access
	origin *http.CrossOriginProtection
	names  []string // of this machine, for Host
	reply
}

// openOperations are for who has not logged in as well.
var openOperations = []string{
	"GET /healthz", "GET " + basePath + "/openapi.json",
	"GET " + basePath + "/access", "POST " + basePath + "/access/claim", "POST " + basePath + "/access/login",
}

func newGuard(access *Access, rp reply) guard {
	names := []string{"localhost", "sheaf"}
	if name, err := os.Hostname(); err == nil {
		names = append(names, strings.ToLower(name))
	}
	for _, name := range slices.Clone(names) {
		names = append(names, name+".lan", name+".local", name+".home.arpa")
	}
	return guard{access: access, origin: http.NewCrossOriginProtection(), names: names, reply: rp}
}

// policy lets a page load nothing but what the daemon serves, and be in no frame.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

func (g guard) check(c *gin.Context) {
	c.Header("Content-Security-Policy", policy)
	c.Header("Referrer-Policy", "no-referrer")
	if err := g.admit(c); err != nil {
		g.fail(c, err)
	}
}

func (g guard) admit(c *gin.Context) error {
	if !g.ours(c.Request.Host) {
		// A foreign page whose name leads here would else be of the same origin.
		return &Error{Code: CodeHostUnknown, Detail: fmt.Sprintf("%q is not a name of this device: use its address", c.Request.Host)}
	}
	if err := g.origin.Check(c.Request); err != nil {
		return &Error{Code: CodeCrossOrigin, Detail: "the request comes from a page of another origin"}
	}
	who, err := g.who(c)
	if err != nil {
		return err
	}
	c.Set(identityKey, who)
	switch {
	case slices.Contains(openOperations, c.Request.Method+" "+c.FullPath()):
		return nil
	case who.Name == "":
		return &Error{Code: CodeLoginRequired, Detail: "log in first"}
	case who.token != nil && strings.HasPrefix(c.FullPath(), basePath+"/access/"):
		// Else whoever finds one could make another, and keep it.
		return &Error{Code: CodeTokenRefused, Detail: "tokens cannot do this: log in with the password"}
	case !who.Write && c.Request.Method != http.MethodGet && c.Request.Method != http.MethodHead:
		return &Error{Code: CodeReadOnly, Detail: "this token may only read"}
	}
	return nil
}

// ours says whether a Host is this device. An address cannot be made to lead elsewhere.
func (g guard) ours(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.Trim(host, "[]")
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return slices.Contains(g.names, strings.ToLower(strings.TrimSuffix(host, ".")))
}

// who is asked by the token, if there is one, else by the cookie.
func (g guard) who(c *gin.Context) (Identity, error) {
	if token, ok := strings.CutPrefix(c.GetHeader("Authorization"), "Bearer "); ok {
		who, known, err := g.access.Token(token)
		if err == nil && !known {
			err = &Error{Code: CodeLoginRequired, Detail: "there is no such token"}
		}
		return who, err
	}
	cookie, err := c.Request.Cookie(cookieName)
	if err != nil {
		return Identity{}, nil //nolint:nilerr // no cookie is nobody, and no failure
	}
	who, _, err := g.access.Session(cookie.Value)
	return who, err
}

// cookieOf is the header that gives a session to a browser, or takes it away.
func cookieOf(session string) string {
	cookie := http.Cookie{Name: cookieName, Value: session, Path: "/", MaxAge: int(sessionAbsolute / time.Second),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode}
	if session == "" {
		cookie.MaxAge = -1
	}
	return cookie.String()
}

// remote is where a request comes from.
func remote(ctx context.Context) netip.Addr {
	if c, ok := ctx.(*gin.Context); ok {
		if from, err := netip.ParseAddrPort(c.Request.RemoteAddr); err == nil {
			return from.Addr().Unmap()
		}
	}
	return netip.Addr{}
}

// GetAccess answers GET /access.
func (h routerHandler) GetAccess(ctx context.Context, _ GetAccessRequestObject) (GetAccessResponseObject, error) {
	claimed, err := h.access.Claimed()
	if err != nil {
		return nil, err
	}
	open, err := h.access.ClaimOpen()
	if err != nil {
		return nil, err
	}
	who := identity(ctx)
	return GetAccess200JSONResponse{Claimed: claimed, ClaimOpen: open, Name: who.Name, Scope: scope(who.Name != "", who.Write)}, nil
}

func scope(read, write bool) string {
	switch {
	case write:
		return "write"
	case read:
		return "read"
	}
	return ""
}

// Claim answers POST /access/claim.
func (h routerHandler) Claim(ctx context.Context, r ClaimRequestObject) (ClaimResponseObject, error) {
	session, err := h.access.Claim(ctx, r.Body.Password, remote(ctx))
	if err != nil {
		return nil, err
	}
	return Claim204Response{Headers: LoggedInResponseHeaders{SetCookie: cookieOf(session)}}, nil
}

// Login answers POST /access/login.
func (h routerHandler) Login(ctx context.Context, r LoginRequestObject) (LoginResponseObject, error) {
	from := remote(ctx)
	session, err := h.access.Login(ctx, r.Body.Password, from)
	if err != nil {
		h.log.Warn("login refused", "from", from, "error", err)
		return nil, err
	}
	return Login204Response{Headers: LoggedInResponseHeaders{SetCookie: cookieOf(session)}}, nil
}

// Logout answers POST /access/logout.
func (h routerHandler) Logout(ctx context.Context, _ LogoutRequestObject) (LogoutResponseObject, error) {
	if err := h.access.Logout(identity(ctx)); err != nil {
		return nil, err
	}
	return Logout204Response{Headers: LoggedInResponseHeaders{SetCookie: cookieOf("")}}, nil
}

// SetPassword answers PUT /access/password.
func (h routerHandler) SetPassword(ctx context.Context, r SetPasswordRequestObject) (SetPasswordResponseObject, error) {
	who := identity(ctx)
	err := h.access.SetPassword(ctx, who, r.Body.Old, r.Body.Password, remote(ctx), who.Name == socketIdentity.Name)
	return SetPassword204Response{}, err
}

// GetSessions answers GET /access/sessions.
func (h routerHandler) GetSessions(ctx context.Context, _ GetSessionsRequestObject) (GetSessionsResponseObject, error) {
	list, err := h.access.grants(sessionsBucket)
	answer := GetSessions200JSONResponse{}
	for _, n := range list {
		answer = append(answer, Session{ID: n.id(), Created: n.Created, Seen: n.Seen, Address: n.Address,
			Current: slices.Equal(n.key, identity(ctx).session)})
	}
	return answer, err
}

// EndSession answers DELETE /access/sessions/{id}.
func (h routerHandler) EndSession(_ context.Context, r EndSessionRequestObject) (EndSessionResponseObject, error) {
	return EndSession204Response{}, h.access.remove(sessionsBucket, r.ID)
}

// GetTokens answers GET /access/tokens.
func (h routerHandler) GetTokens(context.Context, GetTokensRequestObject) (GetTokensResponseObject, error) {
	list, err := h.access.grants(tokensBucket)
	answer := GetTokens200JSONResponse{}
	for _, n := range list {
		answer = append(answer, Token{ID: n.id(), Name: n.Name, Scope: scope(true, n.Write), Created: n.Created, Seen: n.Seen})
	}
	return answer, err
}

// NewToken answers POST /access/tokens.
func (h routerHandler) NewToken(_ context.Context, r NewTokenRequestObject) (NewTokenResponseObject, error) {
	token, err := h.access.NewToken(r.Body.Name, r.Body.Scope == "write")
	return NewToken201JSONResponse{Token: token}, err
}

// RemoveToken answers DELETE /access/tokens/{id}.
func (h routerHandler) RemoveToken(_ context.Context, r RemoveTokenRequestObject) (RemoveTokenResponseObject, error) {
	return RemoveToken204Response{}, h.access.remove(tokensBucket, r.ID)
}

// Panel serves a handler to the LAN, over HTTPS.
type Panel struct {
	address string
	handler http.Handler
	access  *Access
	log     *slog.Logger

	wake       chan struct{}
	mu         sync.Mutex
	interfaces []string // anyInterface alone if the address names a host
}

// anyInterface stands for a listener that is not bound to an interface.
const anyInterface = ""

// NewPanel returns a panel that is to be run. An address without a host, as :8443, is
// served on the interfaces that Listen names, and on no other; one with a host is served
// there, wherever requests come from.
func NewPanel(address string, h http.Handler, access *Access, log *slog.Logger) (*Panel, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("the panel's address is to be HOST:PORT or :PORT: %w", err)
	}
	p := &Panel{address: address, handler: h, access: access, log: log, wake: make(chan struct{}, 1)}
	if host != "" {
		p.interfaces = []string{anyInterface}
	}
	return p, nil
}

// Listen makes these the interfaces that the panel is served on.
func (p *Panel) Listen(interfaces []string) {
	p.mu.Lock()
	if !slices.Equal(p.interfaces, []string{anyInterface}) {
		p.interfaces = slices.Clone(interfaces)
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// bound is a listener of an interface.
type bound struct {
	index int
	end   func()
}

// Run serves until ctx ends. That an interface or its port is not there is no failure:
// the daemon goes on without, and tries again.
func (p *Panel) Run(ctx context.Context) error {
	certificate, err := p.access.certificate()
	if err != nil {
		return fmt.Errorf("the panel's certificate: %w", err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	listeners, told := map[string]bound{}, map[string]string{}
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		p.mu.Lock()
		wanted := p.interfaces
		p.mu.Unlock()
		for name, b := range listeners {
			if index, err := indexOf(name); err != nil || index != b.index || !slices.Contains(wanted, name) {
				b.end()
				delete(listeners, name)
			}
		}
		for _, name := range wanted {
			if _, there := listeners[name]; there {
				continue
			}
			b, err := p.serve(ctx, name, config, &serving)
			switch {
			case err == nil:
				listeners[name] = b
				delete(told, name)
				p.log.Info("panel ready", "address", p.address, "interface", name)
			case told[name] != err.Error():
				told[name] = err.Error()
				p.log.Warn("the panel cannot be served yet; trying again", "interface", name, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			for _, b := range listeners {
				b.end()
			}
			return nil
		case <-p.wake:
		case <-time.After(listenRetry):
		}
	}
}

// serve begins to serve on one interface.
func (p *Panel) serve(ctx context.Context, name string, config *tls.Config, serving *sync.WaitGroup) (bound, error) {
	index, err := indexOf(name)
	if err != nil {
		return bound{}, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		if name == anyInterface {
			return nil
		}
		var bindErr error
		err := raw.Control(func(fd uintptr) { bindErr = unix.BindToDevice(int(fd), name) })
		return errors.Join(err, bindErr)
	}}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", p.address)
	if err != nil {
		return bound{}, err
	}
	ctx, end := context.WithCancel(ctx)
	serving.Go(func() {
		defer end()
		if err := Serve(ctx, &tlsListener{Listener: netutil.LimitListener(ln, maxConnections), config: config}, p.handler); err != nil && ctx.Err() == nil {
			p.log.Warn("the panel has ended", "interface", name, "error", err)
		}
	})
	return bound{index, end}, nil
}

// indexOf is the number of an interface, which another one of its name has not.
func indexOf(name string) (int, error) {
	if name == anyInterface {
		return 0, nil
	}
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return i.Index, nil
}

// tlsListener takes TLS, and sends who speaks plain HTTP to it.
type tlsListener struct {
	net.Listener
	config *tls.Config
}

func (l *tlsListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return tls.Server(&sniffed{Conn: c}, l.config), nil
}

// sniffed is a connection whose first byte says whether it is TLS.
type sniffed struct {
	net.Conn
	looked bool
}

// recordHandshake is the type of the record that TLS begins with (RFC 8446 section 5.1).
const recordHandshake = 22

func (s *sniffed) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if n > 0 && !s.looked {
		s.looked = true
		if b[0] != recordHandshake {
			s.redirect(io.MultiReader(strings.NewReader(string(b[:n])), s.Conn))
			return 0, io.EOF
		}
	}
	return n, err
}

// redirect answers a plain request with where the panel is.
func (s *sniffed) redirect(from io.Reader) {
	_ = s.SetDeadline(time.Now().Add(5 * time.Second))
	request, err := http.ReadRequest(bufio.NewReader(io.LimitReader(from, 16<<10)))
	if err != nil {
		return
	}
	host := request.Host
	if host == "" {
		host = s.LocalAddr().String()
	}
	_, _ = fmt.Fprintf(s.Conn, "HTTP/1.1 308 Permanent Redirect\r\nLocation: https://%s%s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
		host, request.URL.RequestURI())
}

// certificate is the device's own, made when it is first asked for.
func (a *Access) certificate() (tls.Certificate, error) {
	var stored []byte
	if err := a.db.View(func(tx *bbolt.Tx) error {
		stored = slices.Clone(tx.Bucket(accessBucket).Get(certificateKey))
		return nil
	}); err != nil {
		return tls.Certificate{}, err
	}
	if stored == nil {
		made, err := newCertificate(a.now())
		if err != nil {
			return tls.Certificate{}, err
		}
		stored = made
		if err := a.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(accessBucket).Put(certificateKey, made) }); err != nil {
			return tls.Certificate{}, err
		}
	}
	return tls.X509KeyPair(stored, stored)
}

// newCertificate is a key and a certificate that it has signed itself, as PEM. Its names
// do not matter: people who trust it trust the key.
func newCertificate(now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Sheaf"}, DNSNames: []string{"sheaf", "sheaf.lan", "sheaf.local", "localhost"},
		// The clock of a device that has just been made may be behind by years.
		NotBefore: now.Add(-certificateLife), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...), nil
}
