package netlab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// roles are what this binary does instead of testing when a test starts it
// again as a child, named by the environment variable.
const roleVariable = "NETLAB_TEST_ROLE"

var roles = map[string]func(){
	"idle": func() {
		fmt.Println("ready")
		select {}
	},
	"polite": func() {
		terminate := make(chan os.Signal, 1)
		signal.Notify(terminate, syscall.SIGTERM)
		fmt.Println("ready")
		<-terminate
	},
	"deaf": func() {
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		select {}
	},
	"busy": func() {
		memory := make([]byte, 32<<20)
		for i := range memory {
			memory[i] = 1
		}
		for start := time.Now(); time.Since(start) < 300*time.Millisecond; {
		}
		fmt.Println("ready", memory[0])
		select {}
	},
	"lab": labUntilKilled,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		roles[role]()
		return
	}
	os.Exit(m.Run())
}

func command(role string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), roleVariable+"="+role)
	c.Stderr = os.Stderr
	return c
}

// start starts this binary in a role, in the Host, and waits for its first
// line of output.
func start(t *testing.T, h *Host, role string) (*Process, string) {
	t.Helper()
	c := command(role)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c.Stdout = w
	p, err := h.Start(c)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	text, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatalf("the child %q said nothing: %v", role, err)
	}
	return p, strings.TrimSpace(text)
}

func newLab(t *testing.T, config Config) *Lab {
	t.Helper()
	l, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve accepts connections on the Host's port and hands each to f.
func serve(t *testing.T, h *Host, multipath bool, address string, f func(net.Conn)) {
	t.Helper()
	listen := h.Listen
	if multipath {
		listen = h.ListenMultipath
	}
	l, err := listen("tcp", address)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer c.Close()
				f(c)
			}()
		}
	}()
}

func echo(c net.Conn) { io.Copy(c, c) }

func dial(t *testing.T, h *Host, address string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := h.Dial(ctx, "tcp", address)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// ping sends a byte to an echo server and waits for it to come back.
func ping(c net.Conn, timeout time.Duration) (time.Duration, error) {
	c.SetDeadline(time.Now().Add(timeout))
	defer c.SetDeadline(time.Time{})
	start := time.Now()
	if _, err := c.Write([]byte{1}); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return time.Since(start), err
}

// eventually asks until the answer is empty, and fails with it otherwise.
func eventually(t *testing.T, patience time.Duration, ask func() string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		answer := ask()
		if answer == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %s", patience, answer)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
