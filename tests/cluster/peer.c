/* What the pods of `check` run: `peer listen PORT COUNT` ends well after COUNT connections, `peer connect NAME PORT SECONDS` as
 * soon as it has one, and otherwise with 1 when the seconds are over. It prints what it saw last. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int serve(const char *port, int count) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *any;
    if (getaddrinfo(NULL, port, &hints, &any) != 0) return 2;
    int listener = socket(any->ai_family, any->ai_socktype, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, any->ai_addr, any->ai_addrlen) != 0 || listen(listener, 16) != 0) {
        perror("listen");
        return 2;
    }
    for (int served = 0; served < count; served++) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        int peer = accept(listener, (struct sockaddr *)&from, &length);
        if (peer < 0) return 2;
        printf("a connection from %s\n", inet_ntoa(from.sin_addr));
        fflush(stdout);
        close(peer);
    }
    return 0;
}

static int reach(const char *name, const char *port, int seconds) {
    time_t end = time(NULL) + seconds;
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found;
    const char *seen = "nothing";
    do {
        int error = getaddrinfo(name, port, &hints, &found);
        if (error != 0) {
            seen = gai_strerror(error);
        } else {
            int peer = socket(found->ai_family, found->ai_socktype, 0);
            /* Shorter than the first retransmission: an attempt that has failed here does not arrive there later. */
            struct timeval limit = {.tv_usec = 500 * 1000};
            setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
            if (connect(peer, found->ai_addr, found->ai_addrlen) == 0) {
                printf("%s:%s: connected\n", name, port);
                return 0;
            }
            seen = strerror(errno);
            close(peer);
            freeaddrinfo(found);
        }
        struct timespec pause = {.tv_nsec = 100 * 1000 * 1000};
        nanosleep(&pause, NULL);
    } while (time(NULL) < end);
    printf("%s:%s: %s\n", name, port, seen);
    return 1;
}

int main(int count, char **arguments) {
    if (count == 4 && strcmp(arguments[1], "listen") == 0) return serve(arguments[2], atoi(arguments[3]));
    if (count == 5 && strcmp(arguments[1], "connect") == 0) return reach(arguments[2], arguments[3], atoi(arguments[4]));
    return 2;
}
