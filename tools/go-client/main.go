// A client of AF_VSOCK as it is written in Go, static and with package mdlayher/vsock: `cargo xtask soak` builds it and runs it below `nitroxide exec`.
//
//	go-client many             a server and many clients of one process, while the garbage collector sends its threads signals
//	go-client http             net/http over AF_VSOCK
//	go-client ask CID PORT LINE   sends a line to an enclave and shows the answer
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
)

const (
	parent  = 3
	port    = 7200
	nowhere = 7299
	clients = 200
	rounds  = 5
	// A listener's queue may be full; then one tries again.
	mostRefusals = 1000
	pause        = 10 * time.Millisecond
)

func main() {
	words := os.Args[1:]
	if err := run(words); err != nil {
		fmt.Fprintln(os.Stderr, "go-client:", err)
		os.Exit(1)
	}
}

func run(words []string) error {
	cid, err := vsock.ContextID()
	if err != nil {
		return fmt.Errorf("asking for the context ID: %w", err)
	}
	if cid != parent {
		return fmt.Errorf("the context ID is %d instead of %d", cid, parent)
	}
	switch {
	case len(words) == 1 && words[0] == "many":
		return many()
	case len(words) == 1 && words[0] == "http":
		return web()
	case len(words) == 4 && words[0] == "ask":
		return ask(words[1], words[2], words[3])
	}
	return fmt.Errorf("unknown words %q", words)
}

func many() error {
	listener, err := vsock.Listen(port, nil)
	if err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer connection.Close()
				_, _ = io.Copy(connection, connection)
			}()
		}
	}()
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			default:
				runtime.GC()
			}
		}
	}()
	failures := make(chan error, clients)
	var group sync.WaitGroup
	for number := 0; number < clients; number++ {
		group.Add(1)
		go func(number int) {
			defer group.Done()
			for round := 0; round < rounds; round++ {
				if err := exchange(fmt.Sprintf("client %d, round %d", number, round)); err != nil {
					failures <- err
					return
				}
			}
		}(number)
	}
	group.Wait()
	close(failures)
	for err := range failures {
		return err
	}
	if _, err := vsock.Dial(parent, nowhere, nil); err == nil {
		return fmt.Errorf("connected to nobody")
	}
	if _, err := vsock.Listen(port, nil); err == nil {
		return fmt.Errorf("listened where somebody does")
	}
	fmt.Println(clients*rounds, "connections")
	return deadline()
}

func exchange(said string) error {
	var connection *vsock.Conn
	var err error
	for refusals := 0; ; refusals++ {
		if connection, err = vsock.Dial(parent, port, nil); err == nil {
			break
		}
		if refusals == mostRefusals {
			return err
		}
		time.Sleep(pause)
	}
	defer connection.Close()
	if _, err := io.WriteString(connection, said); err != nil {
		return err
	}
	if err := connection.CloseWrite(); err != nil {
		return err
	}
	heard, err := io.ReadAll(connection)
	if err != nil {
		return fmt.Errorf("after %q: %w", heard, err)
	}
	if string(heard) != said {
		return fmt.Errorf("said %q and heard %q", said, heard)
	}
	return nil
}

func deadline() error {
	listener, err := vsock.Listen(port+1, nil)
	if err != nil {
		return err
	}
	defer listener.Close()
	if err := listener.SetDeadline(time.Now().Add(20 * pause)); err != nil {
		return err
	}
	connection, err := listener.Accept()
	if err == nil {
		connection.Close()
		return fmt.Errorf("accept with a deadline gave a connection with %v", connection.RemoteAddr())
	}
	if timeout, is := err.(net.Error); !is || !timeout.Timeout() {
		return fmt.Errorf("accept with a deadline: %w", err)
	}
	return nil
}

func web() error {
	listener, err := vsock.Listen(port, nil)
	if err != nil {
		return err
	}
	go http.Serve(listener, http.HandlerFunc(func(answer http.ResponseWriter, request *http.Request) {
		fmt.Fprintf(answer, "hello %s", request.RemoteAddr)
	}))
	dial := func(context.Context, string, string) (net.Conn, error) { return vsock.Dial(parent, port, nil) }
	client := http.Client{Transport: &http.Transport{DialContext: dial}}
	for round := 0; round < rounds; round++ {
		answer, err := client.Get("http://enclave/")
		if err != nil {
			return err
		}
		text, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil {
			return fmt.Errorf("reading an answer of status %d: %w", answer.StatusCode, err)
		}
		if answer.StatusCode != http.StatusOK || len(text) == 0 {
			return fmt.Errorf("an answer of status %d and %d bytes", answer.StatusCode, len(text))
		}
	}
	fmt.Println(rounds, "requests")
	return nil
}

func ask(cid, port, line string) error {
	numbers := [2]uint64{}
	for index, word := range []string{cid, port} {
		number, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return err
		}
		numbers[index] = number
	}
	connection, err := vsock.Dial(uint32(numbers[0]), uint32(numbers[1]), nil)
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := connection.SetReadDeadline(time.Now().Add(1000 * pause)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(connection, line); err != nil {
		return err
	}
	answer, err := bufio.NewReader(connection).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Print(answer)
	return nil
}
